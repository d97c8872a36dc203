"""Prepares the trajectories that a report shows, token by token.

In: a trajectory, its samples, the settings. Out: `ShownTrajectory`: shaded tokens, and the detail of each token as JSON
for the page's script. `client.report.findings` chooses the trajectories.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
from markupsafe import Markup

from client.contrast import covered_mass, kl_lower_bound, mask_complete, plausible
from client.models.detokenize import Detokenizer
from client.protocol.requests import Trajectory
from client.report.findings import Findings
from client.report.labels import told_apart
from client.runs.keys import Key
from client.runs.manifest import RunManifest
from client.runs.samples import Sample

SHADES = (0.05, 0.2, 0.4, 0.8, 1.6)
"""Nats at which a token's shade deepens. Fixed, so that two reports can be compared by eye."""
LONGEST_SHOWN, LONGEST_QUESTION = 1024, 20_000
"""Most tokens shown of a trajectory, and most characters of a question: eight long ones would make the page too large
to open."""
IDS_SHOWN = 20
"""Ids that a token's detail lists, best first: all of the default top k. Labelled ids are always listed."""


@dataclass(frozen=True)
class ShownStep:
    """One token of a shown trajectory."""

    text: str
    shade: int
    kept: bool


@dataclass(frozen=True)
class ShownTrajectory:
    """A trajectory as the page shows it."""

    title: str
    question: str
    steps: list[ShownStep]
    more: int  # tokens after those
    tokens: int
    kept: int
    mean_kl: float
    detail: Markup  # JSON for the script, escaped: it cannot end its element


def shown_trajectories(findings: Findings, samples: Iterable[Sample], texts: Detokenizer) -> list[ShownTrajectory]:
    return [
        shown_trajectory(
            findings.trajectories[key_of(sample)],
            sample,
            findings.manifest,
            findings.questions.get(key_of(sample)),
            texts,
        )
        for sample in samples
    ]


def key_of(sample: Sample) -> Key:
    return sample.problem_id, sample.sample_index


def title_of(sample: Sample, manifest: RunManifest) -> str:
    return sample.problem_id + (f", sample {sample.sample_index}" if manifest.decoding.n > 1 else "")


def shown_trajectory(
    trajectory: Trajectory, sample: Sample, manifest: RunManifest, question: str | None, texts: Detokenizer
) -> ShownTrajectory:
    log_p, log_q = trajectory.expert_logprobs, trajectory.amateur_logprobs
    bounds, mass = kl_lower_bound(log_p, log_q), covered_mass(log_p, log_q)
    whole = mask_complete(log_p, log_q, manifest.alpha, manifest.expert.vocab_size)
    inside = plausible(log_p, manifest.alpha)
    kept = sample.contrast
    labels = {
        int(step): dict(zip(kept.label_ids[a:b].tolist(), kept.label_weights[a:b].tolist(), strict=True))
        for step, (a, b) in zip(kept.steps, pairwise(kept.label_offsets), strict=True)
    }
    details = []
    for step in range(min(len(bounds), LONGEST_SHOWN)):
        label = labels.get(step, {})
        row = range(log_p.shape[1])
        listed = [
            i for i in row if i < IDS_SHOWN or trajectory.top_ids[step, i] in {trajectory.token_ids[step], *label}
        ]
        names = told_apart([int(trajectory.top_ids[step, i]) for i in listed], texts, for_terminal=False)
        details.append(
            {
                "t": step,
                "token": texts.alone(int(trajectory.token_ids[step])),
                "kl": nats(bounds[step]),
                "mass": f"{mass[step]:.4f}",
                "why": reason(step, bounds[step], bool(whole[step]), step in labels, manifest),
                "rows": [
                    [
                        name,
                        _probability(log_p[step, i]),
                        _probability(log_q[step, i]),
                        f"{label[token]:.3f}" if (token := int(trajectory.top_ids[step, i])) in label else "",
                        int(trajectory.top_ids[step, i] == trajectory.token_ids[step]),
                        int(inside[step, i]),
                    ]
                    for name, i in zip(names, listed, strict=True)
                ],
                "rest": log_p.shape[1] - len(listed),
            }
        )
    pieces = texts.pieces(trajectory.token_ids[:LONGEST_SHOWN])
    return ShownTrajectory(
        title=title_of(sample, manifest),
        question=_shown_question(question or texts.whole(trajectory.prompt_token_ids[:LONGEST_QUESTION])),
        steps=[
            ShownStep(piece or "·", int(np.searchsorted(SHADES, bound)), step in labels)
            for step, (piece, bound) in enumerate(zip(pieces, bounds[:LONGEST_SHOWN], strict=True))
        ],
        more=max(len(bounds) - LONGEST_SHOWN, 0),
        tokens=len(bounds),
        kept=len(kept.steps),
        mean_kl=float(bounds[manifest.first_step :].mean()),
        detail=_script_json(details),
    )


def _shown_question(question: str) -> str:
    return question if len(question) <= LONGEST_QUESTION else f"{question[:LONGEST_QUESTION]}…"


def reason(step: int, bound: float, whole: bool, kept: bool, manifest: RunManifest) -> str:
    """Why a step was kept or not, in a few words."""
    if kept:
        return "kept" if whole else "kept, though its plausible set is not proved whole"
    if step < manifest.first_step:
        return f"left out: before step {manifest.first_step}"
    if not whole and not manifest.keep_incomplete:
        return "left out: its plausible set is not proved whole"
    if manifest.select == "kl" and bound <= manifest.beta:
        return f"left out: not above β = {manifest.beta:g}"
    if manifest.select == "top":
        return f"left out: not among the {100 * (manifest.keep or 0):g}% with the highest KL"
    return "left out: not drawn" if manifest.select == "random" else "left out"


def _script_json(value: Any) -> Markup:
    """JSON that is escaped: it cannot end its HTML element, or start a comment there."""
    text = orjson.dumps(value).decode()
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def nats(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def _probability(logprob: float) -> str:
    """A probability; '–' if the amateur does not know the id."""
    if not math.isfinite(logprob):
        return "–"
    value = math.exp(logprob)
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"

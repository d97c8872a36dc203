"""A RUN as one HTML page that stands alone: no network, no other file.

In: a RUN. Out: the page's text. What models and problems say is text and nothing else: the template escapes all of
it, and the page's policy runs only the one script that is ours, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import orjson
from markupsafe import Markup

from client.contrast import covered_mass, kl_lower_bound, mask_complete, plausible
from client.models.detokenize import Texts, tokenizer_of
from client.protocol.requests import ModelCard, Trajectory
from client.report.analysis import TENTHS, by_kind
from client.report.charts import Axis, Bars, Line, Mark, Note, Threshold, chart, decades, even
from client.report.findings import Findings, TokenDivergence, gather
from client.runs.keys import Key
from client.runs.manifest import RunManifest
from client.runs.run import Run
from client.runs.samples import Sample
from client.runs.tally import Divergences

PAGE = Path(__file__).parent / "template"
SHADES = (0.05, 0.2, 0.4, 0.8, 1.6)
"""Nats at which a token's shade deepens. Fixed, so that two reports can be compared by eye."""
SMALLEST_KL = 1e-4
"""Nats where the axes of divergence begin; what lies below is drawn in the first bar."""
LARGEST_BETA, SMALLEST_ALPHA = 100.0, 1e-6
"""Where the axes end that a setting would stretch; one beyond is marked on the edge."""
BETAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
HEADROOM = 1.12
"""So that the words at a threshold stand above the highest bar."""
CUT = 1.5
"""How many times as high as any other the first bar of divergences may be; a higher one runs off the scale, else
nothing could be seen of the others."""
LONGEST = 1024
"""Tokens of a trajectory that the page shows: eight long ones would make it too large to open."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
ROWS = 20
"""Ids that a token's detail lists, best first: all of the default top k."""


@dataclass(frozen=True)
class Step:
    """One token of a shown trajectory."""

    text: str
    shade: int
    kept: bool


@dataclass(frozen=True)
class Shown:
    """A trajectory as the page shows it."""

    title: str
    question: str
    steps: list[Step]
    more: int  # tokens after those
    tokens: int
    kept: int
    mean_kl: float
    detail: Markup  # JSON for the script, unable to end its element


def report(run: Run) -> str:
    """The page of a RUN. Raises RunError where it has no trajectories, or no tokenizer.json that can be read."""
    findings = gather(run)
    return page(findings, Texts(tokenizer_of(run.tokenizer(), f"{run}/tokenizer.json")))


def page(findings: Findings, texts: Texts) -> str:
    """The page of what was found."""
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": lambda value: f"{value:,}", "percent": _percent, "nats": _nats}
    tally = findings.tally
    divergence_chart, first_bar_cut = _divergence_chart(findings)
    drawn = {_key(sample) for sample in findings.drawn}
    return environment.get_template("report.html").render(
        found=findings,
        totals=findings.totals,
        tally=tally,
        manifest=findings.manifest,
        name=findings.url.rstrip("/").rsplit("/", 1)[-1],
        policy="; ".join(
            ("default-src 'none'", f"style-src '{_digest(style)}'", f"script-src '{_digest(script)}'",
             "base-uri 'none'", "form-action 'none'")
        ),
        style=Markup(style),
        script=Markup(script),
        divergence_chart=divergence_chart,
        first_bar_cut=first_bar_cut,
        beta_chart=_beta_chart(findings),
        betas=_beta_rows(findings),
        alpha_charts=_alpha_charts(findings),
        loss_chart=_loss_chart(findings.losses),
        agreement=_agreement(findings),
        place_chart=_place_chart(findings),
        entropies=[(words, found) for words, kept in (("kept steps", True), ("other steps", False))
                   if (found := findings.steps.entropies(kept))],
        kinds=by_kind(findings.counts.seen, findings.counts.kept, findings.counts.kl, texts.raw),
        ratio=_ratio,
        tokens=[(texts.alone(token.token_id), token) for token in findings.tokens],
        groups=[
            ("Drawn by lot", "drawn from the whole RUN by a digest of their ids: nobody picked them",
             _shown(findings, findings.drawn, texts), []),
            ("The most divergent", "those with the highest mean divergence: look here first for oddities",
             _shown(findings, [sample for sample in findings.most_divergent if _key(sample) not in drawn], texts),
             [_title(sample, findings.manifest) for sample in findings.most_divergent if _key(sample) in drawn]),
        ],
        shades=[*zip(("0", *map(str, SHADES)), (*map(str, SHADES), None), strict=True)],
        provenance=_provenance(findings),
    )  # fmt: skip


def _divergence_chart(findings: Findings) -> tuple[Markup, bool]:
    """How many steps have which divergence, on a logarithmic axis with an edge at beta.

    And whether the first bar runs off the scale, which is the others' then.
    """
    bounds = findings.tally.bounds
    low, high = _kl_range(bounds, findings.manifest.beta)
    beta = min(max(findings.manifest.beta, low), high)
    edges = np.unique(np.concatenate([_between(low, beta), _between(beta, high)]))
    above = bounds.above(edges)
    heights = above[:-1] - above[1:]
    heights[0] += bounds.count - above[0]  # above the last there is none: the axis reaches the largest
    first, others = int(heights[0]), int(heights[1:].max(initial=0))
    cut = first > CUT * others > 0
    top = float(others if cut else max(first, others, 1))
    marks: list[Mark] = [Bars(edges.tolist(), heights.tolist(), beta)]
    if cut:
        marks.append(Note(float(edges[1]), f"{first:,} steps"))
    marks.append(Threshold(beta, f"β = {findings.manifest.beta:g}"))
    drawn = chart(
        Axis("certified KL bound, nats (logarithmic)", low, high, decades(low, high), log=True),
        Axis("steps", 0.0, HEADROOM * top, even(HEADROOM * top)),
        marks,
        f"Histogram of the divergence of {bounds.count} steps; the highest bar stands for {max(first, others)} of them"
        + (f", the next for {others}." if cut else "."),
    )
    return drawn, cut


def _beta_chart(findings: Findings) -> Markup:
    """The share and number of steps that each beta would keep."""
    tally, manifest = findings.tally, findings.manifest
    if not tally.steps:
        return Markup("")
    low, high = 1e-3, max(4.0, min(2 * manifest.beta, LARGEST_BETA))
    betas = np.geomspace(low, high, 120)
    complete, every = (counts.above(betas) / tally.steps for counts in (tally.complete_bounds, tally.bounds))
    kept = every if manifest.keep_incomplete else complete
    top = float(max(kept.max(initial=0.0), every.max(initial=0.0))) or 1.0
    marks: list[Mark] = [Line(betas.tolist(), kept.tolist())]
    if (every - kept).max() > 0.002:
        marks.append(Line(betas.tolist(), every.tolist(), "second"))
    here = _beta_here(findings) / tally.steps
    marks.append(Threshold(manifest.beta, f"β = {manifest.beta:g}: {_percent(here)}", here))
    return chart(
        Axis("β, nats (logarithmic)", low, high, decades(low, high), log=True),
        Axis("kept share of steps", 0.0, HEADROOM * top, [(tick / 100, label) for tick, label in even(100 * top, "%")]),
        marks,
        f"Kept share against beta, falling from {_percent(kept[0])} at {low:g} to {_percent(kept[-1])} at {high:g}.",
        Axis("kept steps", 0.0, HEADROOM * top * tally.steps, even(top * tally.steps)),
    )


def _beta_rows(findings: Findings) -> list[tuple[float, int, float, float, bool]]:
    """beta, steps it would keep, their share, how many a trajectory, and whether it is this RUN's."""
    tally, manifest = findings.tally, findings.manifest
    betas = sorted({*BETAS, manifest.beta})
    counts = tally.bounds if manifest.keep_incomplete else tally.complete_bounds
    kept = {beta: _above(counts, beta) for beta in betas}
    kept[manifest.beta] = _beta_here(findings)
    steps, trajectories = max(tally.steps, 1), max(len(tally.keys), 1)
    return [(beta, kept[beta], kept[beta] / steps, kept[beta] / trajectories, beta == manifest.beta) for beta in betas]


def _beta_here(findings: Findings) -> int:
    """Steps that the RUN's own beta keeps: as counted where it selects by divergence, else from the counters."""
    tally, manifest = findings.tally, findings.manifest
    if manifest.select != "all":  # random keeps as many as kl
        return tally.kept
    counts = tally.bounds if manifest.keep_incomplete else tally.complete_bounds
    return _above(counts, manifest.beta)


def _above(counts: Divergences, beta: float) -> int:
    """How many steps a beta leaves; one that is no float32 leaves as many as the largest that is."""
    return int(counts.above(np.array([min(beta, float(np.finfo(np.float32).max))]))[0])


def _alpha_charts(findings: Findings) -> list[Markup]:
    """Mean plausible set, and share proved whole, against alpha."""
    sets, manifest = findings.plausible_sets, findings.manifest
    if sets is None:
        return []
    low = max(float(sets.alphas[0]), SMALLEST_ALPHA)
    x = Axis("α (logarithmic)", low, 1.0, _alpha_ticks(low), log=True)
    size, whole = (float(np.interp(manifest.alpha, sets.alphas, values)) for values in (sets.mean_size, sets.whole))
    top = float(sets.mean_size.max())
    return [
        chart(
            x,
            Axis("mean plausible set, tokens", 0.0, HEADROOM * top, even(HEADROOM * top)),
            [Line(sets.alphas.tolist(), sets.mean_size.tolist()),
             Threshold(manifest.alpha, f"α = {manifest.alpha:g}: {size:.2f}", size)],
            f"Mean plausible set against alpha, from {top:.1f} tokens down to {sets.mean_size[-1]:.1f}.",
        ),
        chart(
            x,
            Axis("sets proved whole", 0.0, HEADROOM, [(tick / 100, label) for tick, label in even(100, "%")]),
            [Line(sets.alphas.tolist(), sets.whole.tolist()),
             Threshold(manifest.alpha, f"α = {manifest.alpha:g}: {_percent(whole)}", whole)],
            f"Share of plausible sets proved whole against alpha, {_percent(whole)} at this RUN's.",
        ),
    ]  # fmt: skip


def _loss_chart(losses: Sequence[tuple[float, float]]) -> Markup | None:
    if len(losses) < 2:
        return None
    steps, values = zip(*losses, strict=True)
    return chart(
        Axis("optimizer step", 0.0, max(steps), even(max(steps))),
        Axis("loss, nats", 0.0, max(values), even(max(values))),
        [Line(_thinned(steps), _thinned(values))],
        f"Training loss from {values[0]:.3f} to {values[-1]:.3f} over {len(values)} optimizer steps.",
    )


def _place_chart(findings: Findings) -> Markup:
    """The kept share of the steps in each tenth of their trajectories."""
    shares = (100 * findings.steps.places.share).tolist()
    top = max(shares) or 1.0
    return chart(
        Axis("place in the trajectory", 0.0, 100.0, even(100, "%")),
        Axis("kept share of steps", 0.0, HEADROOM * top, even(HEADROOM * top, "%")),
        [Bars(np.linspace(0, 100, TENTHS + 1).tolist(), shares, 0.0)],
        "Kept share by tenth of the trajectory: " + ", ".join(f"{share:.1f}%" for share in shares) + ".",
    )


def _agreement(findings: Findings) -> list[tuple[str, str, int, float]]:
    """What is proved of the two models' best tokens: class, words, steps, share."""
    tally = findings.tally
    open_ = tally.steps - tally.agreeing - tally.differing
    named = (("same", "the same token", tally.agreeing), ("other", "another token", tally.differing),
             ("open", "not decided by the top k", open_))  # fmt: skip
    return [(style, words, steps, steps / max(tally.steps, 1)) for style, words, steps in named]


def _shown(findings: Findings, samples: Iterable[Sample], texts: Texts) -> list[Shown]:
    return [
        _one_shown(
            findings.trajectories[_key(sample)],
            sample,
            findings.manifest,
            findings.questions.get(_key(sample)),
            texts,
        )
        for sample in samples
    ]


def _key(sample: Sample) -> Key:
    return sample.problem_id, sample.sample_index


def _title(sample: Sample, manifest: RunManifest) -> str:
    return sample.problem_id + (f", sample {sample.sample_index}" if manifest.decoding.n > 1 else "")


def _one_shown(
    trajectory: Trajectory, sample: Sample, manifest: RunManifest, question: str | None, texts: Texts
) -> Shown:
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
    for step in range(min(len(bounds), LONGEST)):
        label = labels.get(step, {})
        row = range(log_p.shape[1])
        listed = [i for i in row if i < ROWS or trajectory.top_ids[step, i] in {trajectory.token_ids[step], *label}]
        details.append(
            {
                "t": step,
                "token": texts.alone(int(trajectory.token_ids[step])),
                "kl": _nats(bounds[step]),
                "mass": f"{mass[step]:.4f}",
                "why": _why(step, bounds[step], bool(whole[step]), step in labels, manifest),
                "rows": [
                    [
                        texts.alone(int(trajectory.top_ids[step, i])),
                        _probability(log_p[step, i]),
                        _probability(log_q[step, i]),
                        f"{label[token]:.3f}" if (token := int(trajectory.top_ids[step, i])) in label else "",
                        int(trajectory.top_ids[step, i] == trajectory.token_ids[step]),
                        int(inside[step, i]),
                    ]
                    for i in listed
                ],
                "rest": log_p.shape[1] - len(listed),
            }
        )
    pieces = texts.pieces(trajectory.token_ids[:LONGEST])
    return Shown(
        title=_title(sample, manifest),
        question=question or texts.whole(trajectory.prompt_token_ids),
        steps=[
            Step(piece or "·", int(np.searchsorted(SHADES, bound)), step in labels)
            for step, (piece, bound) in enumerate(zip(pieces, bounds[:LONGEST], strict=True))
        ],
        more=max(len(bounds) - LONGEST, 0),
        tokens=len(bounds),
        kept=len(kept.steps),
        mean_kl=float(bounds[manifest.first_step :].mean()),
        detail=_json(details),
    )


def _why(step: int, bound: float, whole: bool, kept: bool, manifest: RunManifest) -> str:
    """Why a step was kept or not, in a few words."""
    if kept:
        return "kept" if whole else "kept, though its plausible set is not proved whole"
    if step < manifest.first_step:
        return f"left out: before step {manifest.first_step}"
    if not whole and not manifest.keep_incomplete:
        return "left out: its plausible set is not proved whole"
    if manifest.select == "kl" and bound <= manifest.beta:
        return f"left out: not above β = {manifest.beta:g}"
    return "left out: not drawn" if manifest.select == "random" else "left out"


def _provenance(findings: Findings) -> list[tuple[str, str]]:
    manifest, decoding = findings.manifest, findings.manifest.decoding
    warm = f"temperature {decoding.temperature:g}, top-p {decoding.top_p:g}, seed {decoding.seed}"
    how = warm if decoding.temperature else "greedy"
    rows = [
        ("RUN", findings.url),
        ("made", datetime.fromtimestamp(manifest.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("expert", _card(manifest.expert)),
        ("amateur", _card(manifest.amateur)),
        ("problems", f"{manifest.problems.count:,}, digest {manifest.problems.digest[:12]}"),
        ("system prompt", manifest.system_prompt or "none"),
        ("decoding", f"{how}, at most {decoding.max_tokens} tokens, {decoding.n} a problem"),
        ("top k", f"{manifest.top_k}"),
        ("selection", f"{manifest.select}: α = {manifest.alpha:g}, β = {manifest.beta:g} nats, from step "
         f"{manifest.first_step}" + (", incomplete sets kept" if manifest.keep_incomplete else "")
         + (f", seed {manifest.select_seed}" if manifest.select == "random" else "")),
        ("labels", manifest.labels),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()) or "unknown"),
    ]  # fmt: skip
    if manifest.chat_template_kwargs:
        rows.append(("chat template", orjson.dumps(manifest.chat_template_kwargs).decode()))
    if manifest.built_from:
        rows.append(("built from", manifest.built_from))
    return rows


def _card(card: ModelCard) -> str:
    return f"{card.id}, {card.dtype}, {card.vocab_size:,} columns, weights {card.model_fingerprint[:12]}"


def _json(value: Any) -> Markup:
    """JSON that cannot end the element it stands in, nor start a comment there."""
    text = orjson.dumps(value).decode()
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _kl_range(bounds: Divergences, beta: float) -> tuple[float, float]:
    """Both ends of an axis of divergence: whole powers of ten below, what is there above."""
    largest = bounds.quantile(1.0) if bounds.count else 1.0
    return SMALLEST_KL, max(largest, 1.0, min(2 * beta, LARGEST_BETA))


def _between(low: float, high: float) -> np.ndarray:
    """Edges of about equal width on a logarithmic axis, eight a decade."""
    return np.geomspace(low, high, max(2, round(8 * math.log10(high / low)) + 1))


def _alpha_ticks(low: float) -> list[tuple[float, str]]:
    return [(tick, f"{tick:g}") for tick in (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= low]


def _thinned(values: Sequence[float]) -> Sequence[float]:
    """At most about a thousand of them, evenly: more cannot be seen."""
    return values[:: max(1, len(values) // 1000)]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _nats(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def _probability(logprob: float) -> str:
    """A probability; '–' where the amateur does not know the id."""
    if not math.isfinite(logprob):
        return "–"
    value = math.exp(logprob)
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _ratio(token: TokenDivergence) -> str:
    """How many times as likely the expert finds a token: two digits, and powers of ten in superscript."""
    if math.isnan(token.mean_log_ratio):
        return "–"
    digits, power = f"{math.exp(min(token.mean_log_ratio, 700.0)):.1e}".split("e")  # a higher one would overflow
    if -4 <= int(power) < 6:
        return f"×{float(f'{digits}e{power}'):,.10g}"
    return f"×{digits}·10{str(int(power)).translate(SUPERSCRIPT)}"

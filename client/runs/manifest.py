"""run.json as a value: how a RUN was made, and how two writers of one RUN differ.

In: models, settings, problems. Out: `RunManifest`, and differences as lines of text. No I/O.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from pydantic import Field, model_validator

from client.errors import one_line, shorten
from client.problems.problem_set import DIGEST_SHOWN, Frozen, ProblemSetIdentity
from client.protocol.requests import AmateurPrompt, ContrastSettings, Decoding, ModelCard

EARLY = {"amateur_prompt": "same", "decoding.stop_token_ids": []}
"""Settings of early versions, whose identities lack these names."""
BEFORE_ENDS = (
    "; an early version sampled one of the two: its trajectories end at the tokenizer's and the generation config's end"
    " tokens alone, and may go on behind the end of turn"
)
"""Why a RUN of an early version can be read, but not sampled further."""
TEXT_SHOWN = 80
"""Most characters of a value in a message, for example of a system prompt; digests have fewer."""
CARD_TAG = b"- lightreasoner\n"
"""Identifies a card that `dataset_card` made."""
CARD_MARKS = re.compile(r"[\\`*_<>|\[\]]")
"""Characters that Markdown or HTML interprets."""
ALIKE_SHOWN = 20
"""Characters shown of what two long values have in common, before their first difference."""
PICTURE = "divergence.svg"
PICTURE_WIDTH, PICTURE_HEIGHT, PICTURE_TEXT = 640, 240, 40
"""Width and height of a card's picture, and height of the text above and below its bars, in pixels."""
LAST_SECOND = 253_402_300_800
"""The first second of the year 10000, which no date can show."""
EVERY_STEP = 2**62
"""Larger than any step."""


class TopCut(Frozen):
    """The last step that select top keeps: in the order of bound, problem id, sample and step.

    It depends on the whole RUN. run.json records it, so that samples depend on their trajectory and run.json alone.
    """

    kl_lower_bound: float  # nats
    problem_id: str
    sample_index: int
    step: int

    def for_trajectory(self, problem_id: str, sample_index: int) -> tuple[float, int]:
        """The least bound to keep of a trajectory, and the last step to keep with exactly that bound."""
        here, end = (problem_id, sample_index), (self.problem_id, self.sample_index)
        return self.kl_lower_bound, self.step if here == end else EVERY_STEP if here < end else -1


class RunManifest(ContrastSettings, Frozen):
    """run.json: the models, settings, problems and versions that made a RUN.

    A second writer must agree with it in everything that `identity` returns.
    """

    format: int = Field(1, ge=1, le=1)
    created_at: int = Field(ge=0, lt=LAST_SECOND)
    expert: ModelCard
    amateur: ModelCard
    system_prompt: str | None
    chat_template_kwargs: dict[str, Any]
    decoding: Decoding
    top_k: int
    problems: ProblemSetIdentity
    versions: dict[str, str]
    built_from: str | None = None  # the RUN whose trajectories these are
    imported_from: str | None = None  # the file whose samples these are; such a RUN has no trajectories
    top_cut: TopCut | None = None  # of select top
    end_token_ids: list[int] | None = None  # at which every trajectory ends; None: sampled by an early version
    amateur_prompt: AmateurPrompt | None = None  # None: an early version, which had "same" only
    date: str | None = None  # the date that the chat template writes, if any
    imported_digest: str | None = None  # SHA-256 of that file's lines; RUNs imported by early versions lack it

    @model_validator(mode="after")
    def _has_vocabularies(self) -> RunManifest:
        for card in (self.expert, self.amateur):
            if not self.imported_from and card.vocab_size < 1:
                raise ValueError(f"{card.role}.vocab_size is {card.vocab_size}")
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that two writers must share: dotted name -> value. Models are compared by fingerprint."""
        named = {
            "system_prompt": self.system_prompt,
            "chat_template_kwargs": self.chat_template_kwargs,
            "top_k": self.top_k,
            "expert.chat_template_digest": self.expert.chat_template_digest,
            "end_token_ids": self.end_token_ids,
            "amateur_prompt": self.amateur_prompt or EARLY["amateur_prompt"],
            "amateur.chat_template_digest": self.amateur.chat_template_digest if self.amateur_prompt == "own" else None,
            "date": self.date,
            "imported_digest": self.imported_digest,
            "top_cut": self.top_cut and self.top_cut.model_dump(),
        }
        for role, card in (("expert", self.expert), ("amateur", self.amateur)):
            for field in ("model_fingerprint", "tokenizer_fingerprint", "dtype"):
                named[f"{role}.{field}"] = getattr(card, field)
        named |= {field: getattr(self, field) for field in ContrastSettings.model_fields}
        for section in ("decoding", "problems"):
            for field, value in getattr(self, section).model_dump().items():
                named[f"{section}.{field}"] = value
        return named

    def differences(self, other: RunManifest) -> list[str]:
        """The differences from `other`, each as 'name: this against that'. Long values are cut."""
        mine, theirs = self.identity(), other.identity()
        different = [name for name in mine if mine[name] != theirs[name] and not name.startswith("problems.")]
        lines = [f"{name}: {_against(name, mine[name], theirs[name])}" for name in different]
        if self.problems != other.problems:
            lines.append(f"problems: {self.problems} against {other.problems}")
        return lines


def _against(name: str, mine: Any, theirs: Any) -> str:
    """Two different values as text; long ones from shortly before their first difference."""
    if name.endswith(("digest", "fingerprint")):
        return " against ".join(shorten(value, DIGEST_SHOWN) if value else repr(value) for value in (mine, theirs))
    texts = repr(mine), repr(theirs)
    alike = next((index for index, (a, b) in enumerate(zip_longest(*texts)) if a != b), 0)
    begin = max(alike - ALIKE_SHOWN, 0) if max(map(len, texts)) > TEXT_SHOWN else 0
    said = " against ".join(("…" if begin else "") + shorten(text[begin:], TEXT_SHOWN) for text in texts)
    return said + (BEFORE_ENDS if name == "end_token_ids" and None in (mine, theirs) else "")


def dataset_card(manifest: RunManifest, totals: Mapping[str, Any], pictured: bool = False) -> str:
    """README.md of a RUN: what made it, what it holds, and the configurations that `datasets` and the Hub load.

    `totals`: the fields of complete.json. `pictured`: whether the RUN has a `PICTURE`. Without configurations, all
    files of a RUN would be read as one table.
    """
    words = "Steps by the proved divergence of the expert from the amateur, in nats; those above β are orange"
    picture = f"![{words}]({PICTURE})\n\n{words}.\n\n" * pictured
    kinds = ("samples",) if manifest.imported_from else ("samples", "trajectories")
    configurations = "\n".join(f"- config_name: {kind}\n  data_files: {kind}/part-*.parquet" for kind in kinds)
    configurations = configurations.replace("\n", "\n  default: true\n", 1)
    rows = {
        "expert": manifest.expert.id,
        "amateur": manifest.amateur.id,
        "α, β, first step": f"{manifest.alpha:g}, {manifest.beta:g} nats, {manifest.first_step}",
        "selection, labels": f"{manifest.select}, {manifest.labels}",
        "system prompt": manifest.system_prompt or "none",
        "problems, trajectories": f"{totals['problems']:,}, {totals['trajectories']:,}",
        "kept steps": f"{totals['kept']:,} of {totals['steps']:,} ({totals['kept_share']:.1%})",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    table = "\n".join(f"| {name} | {CARD_MARKS.sub(_escaped, one_line(value))} |" for name, value in rows.items())
    return (
        f"---\nlicense:\ntags:\n- lightreasoner\nconfigs:\n{configurations}\n---\n\n"
        "# Contrast samples of LightReasoner\n\n"
        "Steps at which an expert language model disagrees with a weaker amateur, with labels from their contrast\n"
        f"([LightReasoner](https://arxiv.org/abs/2510.07962)).\n\n| | |\n| --- | --- |\n{table}\n\n{picture}"
        '`datasets.load_dataset(FOLDER, split="train")` loads it; `run.json` has every setting. Fill in\n'
        "the licence before you publish it: that of the problems, and of the models' output.\n"
    )


def divergence_picture(edges: Sequence[float], counts: Sequence[int], beta: float) -> str:
    """The card's picture as SVG: a bar for the steps between each two edges, in nats, ascending.

    The first bar holds all steps below its end, the last all above its beginning. Bars above beta are orange, as in the
    report; with beta 0 the first bar, which holds the bounds of 0, is not. A bar's height is the square root of its
    share of the highest bar, because the few steps above beta must be visible.
    """
    wide, high = PICTURE_WIDTH / len(counts), PICTURE_HEIGHT - 2 * PICTURE_TEXT
    ground, most = PICTURE_HEIGHT - PICTURE_TEXT, max(*counts, 1)
    drawn = []
    for index, count in enumerate(counts):
        tall = high * math.sqrt(count / most)
        colour = "#d9650b" if index and edges[index] >= beta else "#5f8fb8"
        between = f"{edges[index]:.3g} to {edges[index + 1]:.3g}"
        if index in (0, len(counts) - 1):
            between = f"above {edges[index]:.3g}" if index else f"up to {edges[1]:.3g}"
        drawn.append(
            f'<rect x="{index * wide + 1:.1f}" y="{ground - tall:.1f}" width="{wide - 2:.1f}" height="{tall:.1f}" '
            f'fill="{colour}"><title>{between} nats: {count:,} steps</title></rect>'
        )
        if index:
            drawn.append(f'<text x="{index * wide:.1f}" y="{ground + 16}">{edges[index]:.2g}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PICTURE_WIDTH} {PICTURE_HEIGHT}" font-size="11" '
        f'font-family="sans-serif" fill="#444"><rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}'
        f'<text x="0" y="{PICTURE_TEXT / 2:g}">β = {beta:g} nats; heights are square roots of the number of steps'
        f'</text><text x="0" y="{ground + 34}">proved divergence, nats</text></svg>\n'
    )


def _escaped(mark: re.Match[str]) -> str:
    return f"\\{mark[0]}"

"""Says what labels would teach: it shows those farthest from the expert, and warns if they teach style.

In: a RUN's tally, the expert's tokens as text. Out: lines and values for a terminal, a table or a page. Texts of models
and problems are made printable here; the page escapes them. Counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from client.errors import RunError
from client.models.detokenize import Detokenizer, tokenizer_of, visible
from client.report.analysis import TokenKind, token_kind
from client.runs.run import Run
from client.runs.tally import OddLabel, Shifts, ShiftTotals
from client.storage.bucket import BucketError

MUCH, LEAST_SHIFT = 0.2, 0.01
"""The style warning needs at least this share of the whole shift, and at least this mean shift, in nats."""
MANY_CUT = 0.1
"""A warning appears if more than this share of the trajectories was cut at --max-tokens."""
OVERTURNS_IN_A_LINE = 3
LONGEST_BEFORE = 40
"""Most characters shown before the step."""
NAME_SHOWN = 60
"""Most characters shown of a label's place: problem id and sample."""


@dataclass(frozen=True)
class ShownLabel:
    """A label far from the expert, as text; probabilities as they are shown."""

    where: str
    before: str
    best: str
    heaviest: str
    overturns: bool  # whether these two are different tokens
    nats: float
    weight: float
    expert: tuple[str, str]  # of best and heaviest
    amateur: tuple[str, str]

    def __str__(self) -> str:
        said = (
            f"{self.nats:.3f} nats, {self.where}: {self.before} ▸ {self.heaviest} (label {self.weight:.3f}, expert "
            f"{self.expert[1]}, amateur {self.amateur[1]})"
        )
        if not self.overturns:
            return f"{said}, the expert's best too"
        return f"{said} instead of {self.best} (expert {self.expert[0]}, amateur {self.amateur[0]})"


@dataclass(frozen=True)
class KindShift:
    """The labels whose heaviest token is of one kind."""

    kind: TokenKind
    labels: int
    share: float  # of the whole shift


def texts_where_readable(run: Run) -> Detokenizer | None:
    """The expert's tokens as text; None if the RUN's tokenizer.json cannot be read."""
    try:
        return Detokenizer(tokenizer_of(run.tokenizer(), f"{run}/tokenizer.json"))
    except (RunError, BucketError):  # the figures do not need it
        return None


def shown_labels(shifts: Shifts, texts: Detokenizer) -> list[ShownLabel]:
    """The labels farthest from the expert, the farthest first; each pair of tokens once."""
    return [_label_text(label, texts) for label in shifts.oddest]


def shifts_by_kind(shifts: Shifts, texts: Detokenizer, ends: Collection[int] | None) -> list[KindShift]:
    """Labels and their shift by the kind of their heaviest token. `ends`: the RUN's end_token_ids."""
    sums = {kind: [0.0, 0.0] for kind in TokenKind}
    for token, (labels, nats) in shifts.by_token.items():
        counted = sums[_mark_kind(token, texts, ends)]
        counted[0] += labels
        counted[1] += nats
    whole = sum(nats for _, nats in sums.values())
    return [KindShift(kind, int(labels), nats / whole if whole else 0.0) for kind, (labels, nats) in sums.items()
            if labels]  # fmt: skip


@dataclass(frozen=True)
class ShownOverturn:
    """An overturn of `Shifts`, with its tokens as text."""

    best: str  # the expert's
    heaviest: str  # the label's
    labels: int
    share: float  # of the whole shift
    at_least: bool  # there may be more labels

    @property
    def times(self) -> str:
        return "at least " * self.at_least + f"{self.labels:,}"


def shown_overturns(shifts: Shifts, texts: Detokenizer) -> list[ShownOverturn]:
    """The most frequent overturns, in descending order."""
    pairs = [told_apart((one.best, one.heaviest), texts) for one in shifts.overturns]
    return [
        ShownOverturn(best, heaviest, one.labels, one.share, one.at_least)
        for (best, heaviest), one in zip(pairs, shifts.overturns, strict=True)
    ]


def overturns_line(overturns: Iterable[ShownOverturn], of: str = "") -> str | None:
    """The most frequent overturns in one line; None if none occurs twice. `of`: words that name the RUN, if needed."""
    listed = [
        f"{one.best} → {one.heaviest} {one.times} times ({one.share:.1%} of the shift)"
        for one in overturns
        if one.labels > 1
    ]
    if not listed:
        return None
    return f"commonest overturns{of}, expert's best → label's best: {', '.join(listed[:OVERTURNS_IN_A_LINE])}"


def style_share(shifts: Shifts, texts: Detokenizer, ends: Collection[int] | None) -> float:
    """The share of the whole shift from labels that replace one mark by another.

    A mark is punctuation, white space or an end token. Replacing a word by a mark, or a mark by a word, is not style:
    it ends or continues the text. `ends`: the RUN's end_token_ids.
    """
    return sum(
        share
        for pair, share in shifts.overturned_shares.items()
        if all(_mark_kind(token, texts, ends) is TokenKind.OTHER for token in pair)
    )


def style_warning(shifts: Shifts, texts: Detokenizer, ends: Collection[int] | None) -> str | None:
    """A warning if labels that replace one mark by another carry much of the shift; else None."""
    totals = shifts.totals()
    if totals is None or totals.mean < LEAST_SHIFT or (share := style_share(shifts, texts, ends)) < MUCH:
        return None
    return (
        f"{share:.0%} of the labels' shift lies on punctuation, white space and end tokens that take each other's "
        "place: training on it changes how the expert writes, not how it reasons. Such labels get fewer with "
        "--max-shift or --labels tilt, and with an amateur that writes like the expert; compare says how many are left"
    )


def _mark_kind(token: int, texts: Detokenizer, ends: Collection[int] | None) -> TokenKind:
    """A token's kind. End tokens count as marks; in RUNs of early versions (`ends` is None), special tokens do."""
    return token_kind(texts.raw(token) if ends is None else "" if token in ends else texts.whole([token]))


def selection_words(select: str, keep: float | None) -> str:
    """A selection in words, with its share."""
    return select if keep is None else f"{select} {100 * keep:g}%"


def label_words(labels: str, gamma: float | None, max_shift: float | None) -> str:
    """A kind of label in words, with its gamma and its bound."""
    tilted = labels if gamma is None else f"{labels}, γ {gamma:g}"
    return tilted if max_shift is None else f"{tilted}, at most {max_shift:g} nats"


def shift_rows(shifts: ShiftTotals | None) -> dict[str, str]:
    """The rows of a table about label shifts, by name; empty if there are no labels."""
    if shifts is None:
        return {}
    return {
        "labels that overturn the expert's best": f"{shifts.overturned:,} ({shifts.overturned_share:.1%})",
        "label shift, mean": f"{shifts.mean:.3f} nats",
        **{f"label shift, quantile {q}": f"{value:.3f} nats" for q, value in shifts.quantiles.items()},
        "label shift, largest": f"{shifts.largest:.3f} nats",
    }


def printable(text: str) -> str:
    """Replace unprintable characters: the text then moves no cursor and sets no colour."""
    return "".join(letter if letter.isprintable() else "�" for letter in visible(text))


def told_apart(tokens: Sequence[int], texts: Detokenizer, for_terminal: bool = True) -> list[str]:
    """Tokens as text, printable if `for_terminal`. Different tokens with the same text have their ids added."""
    shown = [printable(text) if for_terminal else text for text in map(texts.alone, tokens)]
    ids: dict[str, set[int]] = {}
    for text, token in zip(shown, tokens, strict=True):
        ids.setdefault(text, set()).add(token)
    return [f"{text} #{token}" if len(ids[text]) > 1 else text for text, token in zip(shown, tokens, strict=True)]


def _label_text(label: OddLabel, texts: Detokenizer) -> ShownLabel:
    before = printable(texts.tail(label.before))
    best, heaviest = told_apart((label.best, label.heaviest), texts)
    where = label.problem_id + (f", sample {label.sample_index}" if label.sample_index else "")
    return ShownLabel(
        where=f"{printable(where)[:NAME_SHOWN]}, step {label.step}",
        before=("…" if label.step > len(label.before) or len(before) > LONGEST_BEFORE else "")
        + before[-LONGEST_BEFORE:],
        best=best,
        heaviest=heaviest,
        overturns=label.best != label.heaviest,
        nats=label.nats,
        weight=label.weight,
        expert=(_probability_text(label.expert[0]), _probability_text(label.expert[1])),
        amateur=(_probability_text(label.amateur[0]), _probability_text(label.amateur[1])),
    )


def _probability_text(value: float) -> str:
    """A probability; '–' if it is unknown or 0."""
    if math.isnan(value) or value == 0.0:
        return "–"
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"

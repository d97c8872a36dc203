"""Analyses the steps that a RUN's contrast keeps: their places, the models' entropies, the kinds of tokens.

It is the paper's preliminary analysis (arXiv 2510.07962, section 2), as far as the top k allow. In: trajectories with
their kept steps, one by one. Out: a few counts, whatever the RUN's size.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

TENTHS = 10
BETAS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Values of beta, in nats, that a report compares with the RUN's own."""
DRAWN_STEPS, IDS_BEFORE = 3, 8
"""Steps shown of each band, and tokens shown before each step."""


class TokenKind(StrEnum):
    """The kind of a token, for a reader of solutions."""

    DIGIT = "digits"
    OPERATOR = "operators and signs"
    WORD = "words"
    OTHER = "punctuation, spaces and the rest"


def token_kind(text: str) -> TokenKind:
    """The kind of a token's text, without spaces around it: digits, else words, else signs of arithmetic and LaTeX."""
    bare = text.strip()
    if re.fullmatch(r"[\d.,]*\d[\d.,]*", bare):
        return TokenKind.DIGIT
    if re.search(r"[^\W\d_]", bare) and not bare.startswith("\\"):
        return TokenKind.WORD
    return TokenKind.OPERATOR if re.search(r"[-+*/=<>^%×÷·±√\\()\[\]{}$|−]", bare) else TokenKind.OTHER


@dataclass(frozen=True)
class KindCount:
    """Counts over the steps whose tokens are of one kind."""

    kind: TokenKind
    steps: int
    kept: int
    mean_kl: float  # nats


@dataclass(frozen=True)
class Entropies:
    """Mean entropies in nats. They are lower bounds: the tail beyond the top k counts as one token."""

    steps: int
    expert: float
    amateur: float


@dataclass(frozen=True)
class StepPositions:
    """Steps by the tenth of their trajectory: [10] each."""

    steps: npt.NDArray[np.int64]
    kept: npt.NDArray[np.int64]

    @property
    def share(self) -> npt.NDArray[np.float64]:
        """The kept share of each tenth; 0 for a tenth without steps."""
        return self.kept / np.maximum(self.steps, 1)


class StepAnalysis:
    """Adds up places and entropies of the steps from `first_step` on."""

    def __init__(self, first_step: int) -> None:
        self._first = first_step
        self._steps, self._kept = np.zeros(TENTHS, np.int64), np.zeros(TENTHS, np.int64)
        self._sums = {True: np.zeros(3), False: np.zeros(3)}  # by kept: steps, expert's entropy, amateur's

    def add(self, log_p: npt.NDArray[Any], log_q: npt.NDArray[Any], kept_steps: npt.NDArray[Any]) -> None:
        """Count one trajectory: both models' log-probabilities of the expert's top k, [T, k], and its kept steps."""
        length = len(log_p)
        steps = np.arange(self._first, length)
        tenths = steps * TENTHS // max(length, 1)
        kept = np.isin(steps, kept_steps)
        self._steps += np.bincount(tenths, minlength=TENTHS)
        self._kept += np.bincount(tenths[kept], minlength=TENTHS)
        expert, amateur = entropy_lower_bound(log_p[self._first :]), entropy_lower_bound(log_q[self._first :])
        for which in (True, False):
            mine = kept == which
            self._sums[which] += (mine.sum(), expert[mine].sum(), amateur[mine].sum())

    @property
    def places(self) -> StepPositions:
        return StepPositions(self._steps, self._kept)

    def entropies(self, kept: bool) -> Entropies | None:
        """The mean entropies of the kept steps, or of the others; None if there are none."""
        steps, expert, amateur = self._sums[kept]
        return Entropies(int(steps), expert / steps, amateur / steps) if steps else None


@dataclass(frozen=True)
class DrawnStep:
    """A step drawn at random: its token, and the last few tokens before it."""

    before: tuple[int, ...]
    token: int


@dataclass(frozen=True)
class BetaBand:
    """The steps with low < bound <= high, in nats. The last band has no `high`."""

    low: float
    high: float | None
    steps: int
    tokens: dict[int, int]  # id -> steps with this token
    drawn: list[DrawnStep]


class BetaBands:
    """Counts the steps between two betas by token, and draws a few of each band. Memory holds only these."""

    def __init__(self, beta: float) -> None:
        self._edges = np.array(sorted({*BETAS, beta}))
        self._tokens: list[Counter[int]] = [Counter() for _ in range(len(self._edges) + 1)]
        self._drawn: list[list[tuple[int, DrawnStep]]] = [[] for _ in self._tokens]

    def add(self, token_ids: npt.NDArray[Any], bounds: npt.NDArray[Any], first_step: int, lot: int) -> None:
        """Count one trajectory's steps from `first_step` on. `bounds`: their KL bounds. `lot`: the seed of the draw."""
        bands = np.searchsorted(self._edges, bounds, side="left")
        ranks = np.random.Philox(lot).random_raw(len(bounds))
        for band in np.unique(bands):
            here = np.flatnonzero(bands == band)
            self._tokens[band].update(token_ids[first_step + here].tolist())
            drawn = self._drawn[band]
            for index in here[np.argsort(ranks[here])[:DRAWN_STEPS]].tolist():
                step, rank = first_step + index, int(ranks[index])
                if len(drawn) < DRAWN_STEPS or rank < drawn[-1][0]:
                    before = tuple(token_ids[max(step - IDS_BEFORE, 0) : step].tolist())
                    drawn.append((rank, DrawnStep(before, int(token_ids[step]))))
                    drawn.sort(key=lambda ranked: ranked[0])
                    del drawn[DRAWN_STEPS:]

    @property
    def bands(self) -> list[BetaBand]:
        """The bands, from the smallest bounds to the largest."""
        edges = [0.0, *self._edges.tolist(), None]
        return [
            BetaBand(low or 0.0, high, tokens.total(), dict(tokens), [step for _, step in drawn])
            for low, high, tokens, drawn in zip(edges, edges[1:], self._tokens, self._drawn, strict=False)
        ]


def kind_shares(tokens: dict[int, int], text: Callable[[int], str]) -> dict[TokenKind, float]:
    """The share of the steps for each kind of token."""
    sums = dict.fromkeys(TokenKind, 0)
    for token, steps in tokens.items():
        sums[token_kind(text(token))] += steps
    whole = max(sum(sums.values()), 1)
    return {kind: steps / whole for kind, steps in sums.items()}


def entropy_lower_bound(logprobs: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """-sum p_i log p_i - p_r log p_r in nats, where p_r is the probability beyond the k ids: [n, k] -> [n].

    The entropy is at least this, because merging tokens can only lower it. Ids with log-probability -inf add nothing.
    """
    known = np.where(np.isfinite(logprobs), logprobs, 0.0).astype(np.float64)
    p = np.where(np.isfinite(logprobs), np.exp(known), 0.0)
    rest = np.clip(1.0 - p.sum(axis=1), 0.0, 1.0)
    return -(p * known).sum(axis=1) - rest * np.log(np.where(rest > 0, rest, 1.0))


def by_kind(
    seen: npt.NDArray[np.int64], kept: npt.NDArray[np.int64], kl: npt.NDArray[np.float64], text: Callable[[int], str]
) -> list[KindCount]:
    """Sum counts and divergences by token id, [V] each, for each kind of token."""
    sums = {kind: np.zeros(3) for kind in TokenKind}
    for token in np.flatnonzero(seen):
        sums[token_kind(text(int(token)))] += (seen[token], kept[token], kl[token])
    return [KindCount(kind, int(s), int(k), d / s) for kind, (s, k, d) in sums.items() if s]

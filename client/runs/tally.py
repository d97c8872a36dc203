"""Counts over a RUN's trajectories in one pass, for complete.json, reports and comparisons.

In: trajectories, one at a time. Out: totals, how many steps any beta would keep, how far the labels move the expert.
Memory holds a key per trajectory and a fixed table of counters, for any number of steps. Never reads or writes a RUN.
"""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from client.contrast import LabelShifts, label_shifts, owners_of
from client.protocol.requests import Trajectory
from client.runs.keys import Key, Keys
from client.runs.manifest import RunManifest
from client.runs.samples import SampledGroup, sampled_group, sampled_groups

KL_QUANTILES = (0.1, 0.5, 0.9, 0.99)
ODD_LABELS, TOKENS_BEFORE = 8, 12
"""Labels shown for their shift, each pair of tokens once, and tokens shown before each."""
HISTOGRAM_POWERS, HISTOGRAM_MIDDLE = range(-6, 5), 0.4
OVERTURNS, MOST_OVERTURNS = 8, 2**15
"""Pairs of tokens shown for their frequency, and most pairs counted: beyond, the rarer half is dropped."""


@dataclass(frozen=True)
class ShiftTotals:
    """How far the labels move the expert (`client.contrast.label_shifts`), in nats."""

    overturned: int  # labels whose heaviest token is not the expert's best
    overturned_share: float  # of the labels
    mean: float
    quantiles: dict[str, float]
    largest: float


@dataclass(frozen=True)
class OddLabel:
    """A label far from the expert, with both models' probabilities of two tokens."""

    nats: float
    problem_id: str
    sample_index: int
    step: int
    before: tuple[int, ...]  # the last few token ids before the step
    best: int  # the expert's
    heaviest: int  # the label's
    weight: float  # of the label's heaviest
    expert: tuple[float, float]  # of best and heaviest; NaN if not among the top k
    amateur: tuple[float, float]

    @property
    def rank(self) -> tuple[float, str, int, int]:
        """A sort key: the farthest label first; among equals, the order of problem, sample and step."""
        return -self.nats, self.problem_id, self.sample_index, self.step


@dataclass(frozen=True)
class Overturn:
    """Labels that overturn the expert's best token, all with the same best and the same heaviest token."""

    best: int  # the expert's
    heaviest: int  # the label's
    labels: int
    share: float  # of the whole shift
    at_least: bool  # too many pairs occurred: some labels of this one may be missing


@dataclass(frozen=True)
class RunTotals:
    """The totals of a RUN. Each key counts once. Steps before first_step do not count."""

    problems: int
    trajectories: int
    failed: int
    tokens: int
    steps: int
    kept: int
    kept_share: float
    incomplete: int
    mean_plausible_set: float  # labelled ids per kept step
    mean_covered_mass: float
    kl_quantiles: dict[str, float]  # of the KL bound, in nats; see `Divergences`
    cut: int | None = None  # trajectories that reached max_tokens; early versions lack this and the next fields
    without_kept_steps: int | None = None  # trajectories
    label_shifts: ShiftTotals | None = None  # None: no label


class OrderedSum:
    """A sum in the order of the parts' names, in whatever order they are added: its rounding is always the same."""

    def __init__(self) -> None:
        self._values: dict[str, array[float]] = {}

    def add(self, values: Iterable[float], part: str) -> None:
        self._values.setdefault(part, array("d")).extend(values)

    def __float__(self) -> float:
        total = 0.0
        for value in chain.from_iterable(self._values[part] for part in sorted(self._values)):
            total += value
        return total


class Divergences:
    """A histogram of the steps' KL bounds, of fixed size.

    It has a counter for each value of the 19 bits after a float32's sign: a quantile, or a count above a threshold, is
    exact to one part in 2,048. A bound below 0, which only rounding causes, counts as 0.
    """

    DROPPED_BITS = 12

    def __init__(self) -> None:
        self._counts = np.zeros(2 ** (31 - self.DROPPED_BITS), np.int64)

    def add(self, bounds: npt.NDArray[np.floating]) -> None:
        """Count steps by their bounds, in nats: [n]."""
        np.add.at(self._counts, self._cells(bounds), 1)

    @property
    def count(self) -> int:
        return int(self._counts.sum())

    def above(self, thresholds: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """The number of steps with a bound above each threshold: [m] -> [m]."""
        up_to = self._counts.cumsum()
        return up_to[-1] - up_to[self._cells(thresholds)]

    def histogram(self, beta: float) -> tuple[list[float], list[int]]:
        """m + 1 edges, beta times powers of 2, and the m numbers of steps between them; the outer ones take the rest.

        With beta 0 the edges are powers of 2 times `HISTOGRAM_MIDDLE`.
        """
        edges = [(beta or HISTOGRAM_MIDDLE) * 2.0**power for power in HISTOGRAM_POWERS]
        above = self.above(np.array(edges[1:-1])).tolist()
        return edges, [int(many) for many in -np.diff([self.count, *above, 0])]

    def place(self, rank: int) -> tuple[int, int]:
        """The counter of the rank-th largest bound, and the number of steps in the counters above it."""
        up_to = self._counts.cumsum()
        cell = int(np.searchsorted(up_to, up_to[-1] - rank, side="right"))
        return cell, int(up_to[-1] - up_to[cell])

    def alike(self, bounds: npt.NDArray[np.floating], cell: int) -> npt.NDArray[np.bool_]:
        """Which bounds belong to a counter: [n] -> [n]."""
        return self._cells(bounds) == cell

    def quantile(self, share: float) -> float:
        """The bound that this share of the steps does not exceed, in nats; nan without steps."""
        if not self.count:
            return float("nan")
        rank = share * (self.count - 1)
        cell = int(np.searchsorted(self._counts.cumsum(), rank, side="right"))
        edges = (np.array([cell, cell + 1], np.uint32) << self.DROPPED_BITS).view(np.float32)
        return float(edges.mean()) if cell else 0.0

    def _cells(self, values: npt.NDArray[np.floating]) -> npt.NDArray[np.integer[Any]]:
        largest = np.finfo(np.float32).max
        positive = np.clip(values, 0.0, largest).astype(np.float32) + np.float32(0.0)  # -0.0 becomes 0.0
        return positive.view(np.uint32) >> self.DROPPED_BITS


class Shifts:
    """Adds up how far labels move the expert. Memory holds a few numbers per token id, one per trajectory."""

    def __init__(self, vocab_size: int) -> None:
        self.nats = Divergences()
        self.overturned = 0
        self._labels, self._nats = np.zeros(vocab_size, np.int64), np.zeros(vocab_size)  # by heaviest id
        self._sum, self._largest = OrderedSum(), 0.0
        self._odd: dict[tuple[int, int], OddLabel] = {}
        self._overturns: dict[tuple[int, int], list[float]] = {}  # best, heaviest -> labels, nats
        self._forgotten = False  # whether rare pairs were dropped

    def add(self, group: SampledGroup, alpha: float, part: str = "") -> None:
        """Count the labels of a group. `part`: as in `Tally.add`."""
        kept, logprobs = group.kept, (group.expert_logprobs, group.amateur_logprobs)
        found = label_shifts(kept, group.top_ids, *logprobs, alpha, group.figures.labelled)
        owners = owners_of(group.begins)[kept.steps]
        self.nats.add(found.nats)
        self.overturned += int(np.count_nonzero(found.overturned))
        self._sum.add(np.bincount(owners, found.nats, len(group.trajectories)).tolist(), part)
        self._largest = max(self._largest, float(found.nats.max(initial=0.0)))
        np.add.at(self._labels, found.heaviest, 1)
        np.add.at(self._nats, found.heaviest, found.nats)
        best = group.top_ids[kept.steps, 0]
        over = found.overturned
        for of, by, nats in zip(
            best[over].tolist(), found.heaviest[over].tolist(), found.nats[over].tolist(), strict=True
        ):
            counted = self._overturns.setdefault((of, by), [0, 0.0])
            counted[0] += 1
            counted[1] += nats
        if len(self._overturns) > MOST_OVERTURNS:
            often = sorted(self._overturns.items(), key=lambda pair: -pair[1][0])
            self._overturns, self._forgotten = dict(often[: MOST_OVERTURNS // 2]), True
        least = min((label.nats for label in self._odd.values()), default=0.0) if len(self._odd) == ODD_LABELS else 0.0
        self._note_odd(group, found, owners, np.flatnonzero(found.nats >= least))

    def _note_odd(
        self, group: SampledGroup, found: LabelShifts, owners: npt.NDArray[np.intp], among: npt.NDArray[np.intp]
    ) -> None:
        """Keep the few labels farthest from the expert; for each pair of tokens, the farthest only."""
        names = [(one.problem_id, one.sample_index) for one in group.trajectories]
        order = np.argsort(sorted(range(len(names)), key=names.__getitem__))  # the rank of each by its key
        pairs: set[tuple[int, int]] = set()
        for index in among[np.lexsort((among, order[owners[among]], -found.nats[among]))].tolist():
            row = int(group.kept.steps[index])
            pair = int(group.top_ids[row, 0]), int(found.heaviest[index])
            if pair in pairs:
                continue
            pairs.add(pair)
            trajectory, step = group.trajectories[owners[index]], row - int(group.begins[owners[index]])
            nats = float(found.nats[index])
            rank = -nats, trajectory.problem_id, trajectory.sample_index, step
            if pair not in self._odd or rank < self._odd[pair].rank:
                column = int(found.columns[index])
                self._odd[pair] = OddLabel(
                    nats=nats,
                    problem_id=trajectory.problem_id,
                    sample_index=trajectory.sample_index,
                    step=step,
                    before=tuple(trajectory.token_ids[max(step - TOKENS_BEFORE, 0) : step].tolist()),
                    best=pair[0],
                    heaviest=pair[1],
                    weight=float(found.weight[index]),
                    expert=_two(group.expert_logprobs[row], column),
                    amateur=_two(group.amateur_logprobs[row], column),
                )
                if len(self._odd) > ODD_LABELS:
                    del self._odd[max(self._odd, key=lambda pair: self._odd[pair].rank)]
            if len(pairs) == ODD_LABELS:
                return

    @property
    def by_token(self) -> dict[int, tuple[int, float]]:
        """The number of labels and their nats, by heaviest id."""
        return {
            int(token): (int(self._labels[token]), float(self._nats[token])) for token in np.flatnonzero(self._labels)
        }

    @property
    def oddest(self) -> list[OddLabel]:
        """The labels farthest from the expert, the farthest first."""
        return sorted(self._odd.values(), key=lambda label: label.rank)

    @property
    def overturns(self) -> list[Overturn]:
        """The most frequent overturns, in descending order."""
        often = sorted(self._overturns.items(), key=lambda pair: (-pair[1][0], pair[0]))[:OVERTURNS]
        shares = self.overturned_shares
        return [Overturn(*pair, int(labels), shares[pair], self._forgotten) for pair, (labels, _) in often]

    @property
    def overturned_shares(self) -> dict[tuple[int, int], float]:
        """The share of the whole shift from labels that overturn, by the expert's best and the label's heaviest id.

        If there are too many pairs, the rare ones are missing.
        """
        whole = float(self._sum) or 1.0
        return {pair: nats / whole for pair, (_, nats) in self._overturns.items()}

    def totals(self) -> ShiftTotals | None:
        """The totals; None if there are no labels."""
        if not (labels := self.nats.count):
            return None
        return ShiftTotals(
            overturned=self.overturned,
            overturned_share=self.overturned / labels,
            mean=float(self._sum) / labels,
            quantiles={f"{share:g}": self.nats.quantile(share) for share in KL_QUANTILES},
            largest=self._largest,
        )


def _two(logprobs: npt.NDArray[np.floating], column: int) -> tuple[float, float]:
    """The probabilities in column 0 and in `column` of the top k; NaN beyond the top k."""
    p = np.exp(logprobs.astype(np.float64))
    return float(p[0]), float(p[column]) if column < len(p) else float("nan")


class Tally:
    """The counts of a RUN. A key that occurs twice is counted once, the first time.

    `expected`: the ids of the RUN's problems; see `Keys`.
    """

    def __init__(self, manifest: RunManifest, expected: Iterable[str] = ()) -> None:
        self.manifest = manifest
        self.keys = Keys(expected=expected)
        self.bounds = Divergences()  # every step
        self.complete_bounds = Divergences()  # those with a complete plausible set
        self.tokens = self.kept = self.incomplete = self.labelled = self.agreeing = self.differing = 0
        self.cut = self.without_kept_steps = 0
        self.shifts = Shifts(manifest.expert.vocab_size)
        self._mass, self._entropy = OrderedSum(), OrderedSum()

    def add_all(self, trajectories: Iterable[Trajectory]) -> None:
        """Count trajectories, in the order of their parts."""
        for group in sampled_groups(trajectories, self.manifest):
            self.add(group)

    def add(self, group: SampledGroup, part: str = "") -> None:
        """Count a group with the manifest's settings.

        `part`: its part's name, if parts do not come in the order of their names.
        """
        new = [one for one in group.trajectories if self.keys.add((one.problem_id, one.sample_index))]
        if not new:
            return
        if len(new) < len(group.trajectories):
            group = sampled_group(new, self.manifest)
        kept, figures, count = group.kept, group.figures, len(new)
        owners = owners_of(group.begins)
        counted = np.arange(len(owners)) - group.begins[owners] >= self.manifest.first_step
        bounds = figures.kl_lower_bound[counted]
        self.bounds.add(bounds)
        self.complete_bounds.add(bounds[figures.complete[counted]])
        self.agreeing += int(np.count_nonzero(figures.same_top1[counted]))
        self.differing += int(np.count_nonzero(figures.other_top1[counted]))
        self.tokens += len(owners)
        self.kept += len(kept.steps)
        self.cut += sum(one.finish_reason == "length" for one in new)
        self.without_kept_steps += count - len(np.unique(owners[kept.steps]))
        self.shifts.add(group, self.manifest.alpha, part)
        self.incomplete += kept.incomplete
        self.labelled += len(kept.label_ids)
        self._mass.add(np.bincount(owners[counted], figures.covered_mass[counted], count).tolist(), part)
        weights = kept.label_weights.astype(np.float64)
        entropies = -weights * np.log(weights, where=weights > 0, out=np.zeros_like(weights))
        of_labels = np.repeat(owners[kept.steps], np.diff(kept.label_offsets))
        self._entropy.add(np.bincount(of_labels, entropies, count).tolist(), part)

    @property
    def steps(self) -> int:
        return self.bounds.count

    @property
    def mean_covered_mass(self) -> float:
        return float(self._mass) / self.steps if self.steps else 0.0

    @property
    def mean_label_entropy(self) -> float:
        """The mean entropy of the labels, in nats. A label on one token has 0."""
        return float(self._entropy) / self.kept if self.kept else 0.0

    def totals(self, failed: Iterable[Key]) -> RunTotals:
        """The totals. A key in `failed` counts as failed unless its trajectory is there."""
        return RunTotals(
            problems=self.keys.problems,
            trajectories=len(self.keys),
            failed=sum(key not in self.keys for key in failed),
            tokens=self.tokens,
            steps=self.steps,
            kept=self.kept,
            kept_share=self.kept / self.steps if self.steps else 0.0,
            incomplete=self.incomplete,
            mean_plausible_set=self.labelled / self.kept if self.kept else 0.0,
            mean_covered_mass=self.mean_covered_mass,
            kl_quantiles={f"{q:g}": self.bounds.quantile(q) for q in KL_QUANTILES} if self.steps else {},
            cut=self.cut,
            without_kept_steps=self.without_kept_steps,
            label_shifts=self.shifts.totals(),
        )


class CountedParts:
    """Counts the parts that this process writes, several at a time. Sealing a RUN then reads only their keys again."""

    def __init__(self, manifest: RunManifest, expected: Iterable[str] = ()) -> None:
        self.tally = Tally(manifest, expected)
        self.parts: dict[str, int] = {}  # how many trajectories each has
        self._adding = threading.Lock()

    def add(self, part: str, group: SampledGroup) -> None:
        with self._adding:
            self.tally.add(group, part)

    def written(self, part: str, trajectories: int) -> None:
        """Record a part that has been written, with its samples."""
        self.parts[part] = trajectories

    @property
    def whole(self) -> bool:
        """Whether the tally has the trajectories of these parts, each once, and no others."""
        return sum(self.parts.values()) == len(self.tally.keys)

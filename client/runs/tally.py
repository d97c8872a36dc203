"""Counts over a RUN's trajectories in one pass, for complete.json, reports and comparisons.

In: trajectories, one at a time. Out: totals, and how many steps any beta would keep. Memory holds a key per trajectory
and a fixed table of counters, for any number of steps. Never reads or writes a RUN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from client.contrast import Contrast, covered_mass, kl_lower_bound, mask_complete, top1
from client.protocol.requests import Trajectory
from client.runs.keys import Key, Keys
from client.runs.manifest import RunManifest
from client.runs.samples import sample_of

KL_QUANTILES = (0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class RunTotals:
    """What a RUN holds. Each key counts once. Steps before first_step do not count."""

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


class Divergences:
    """A histogram of the steps' KL bounds, of fixed size.

    It has a counter for each value of a float32's sign and 19 leading bits: a quantile, or a count above a threshold,
    is exact to one part in 2,048. A bound below 0, which only rounding gives, counts as 0.
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
        """How many steps have a bound above each threshold: [m] -> [m]."""
        up_to = self._counts.cumsum()
        return up_to[-1] - up_to[self._cells(thresholds)]

    def place(self, rank: int) -> tuple[int, int]:
        """The counter of the rank-th largest bound, and how many steps the counters above it hold."""
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
        positive = np.maximum(values.astype(np.float32), np.float32(0.0)) + np.float32(0.0)  # -0.0 becomes 0.0
        return positive.view(np.uint32) >> self.DROPPED_BITS


class Tally:
    """The counts of a RUN. A key that comes twice is counted once, the first time.

    `expected`: the ids of its problems; see `Keys`.
    """

    def __init__(self, manifest: RunManifest, expected: Iterable[str] = ()) -> None:
        self.manifest = manifest
        self.keys = Keys(expected=expected)
        self.bounds = Divergences()  # every step
        self.complete_bounds = Divergences()  # those with a complete plausible set
        self.tokens = self.kept = self.incomplete = self.labelled = self.agreeing = self.differing = 0
        self._mass = self._entropy = 0.0

    def add(self, trajectory: Trajectory, kept: Contrast | None = None) -> None:
        """Count a trajectory. `kept`: its samples with the manifest's settings; computed if not given."""
        if not self.keys.add((trajectory.problem_id, trajectory.sample_index)):
            return
        manifest, first = self.manifest, self.manifest.first_step
        kept = kept or sample_of(trajectory, manifest).contrast
        logprobs = trajectory.expert_logprobs[first:], trajectory.amateur_logprobs[first:]
        bounds = kl_lower_bound(*logprobs)
        self.bounds.add(bounds)
        self.complete_bounds.add(bounds[mask_complete(*logprobs, manifest.alpha, manifest.expert.vocab_size)])
        agreeing, differing = top1(logprobs[1])
        self.agreeing += int(agreeing.sum())
        self.differing += int(differing.sum())
        self.tokens += len(trajectory.token_ids)
        self.kept += len(kept.steps)
        self.incomplete += kept.incomplete
        self.labelled += len(kept.label_ids)
        self._mass += float(covered_mass(*logprobs).sum())
        weights = kept.label_weights.astype(np.float64)
        self._entropy -= float((weights * np.log(weights, where=weights > 0, out=np.zeros_like(weights))).sum())

    @property
    def steps(self) -> int:
        return self.bounds.count

    @property
    def mean_covered_mass(self) -> float:
        return self._mass / self.steps if self.steps else 0.0

    @property
    def mean_label_entropy(self) -> float:
        """Over the kept steps, in nats: 0 for a label on one token."""
        return self._entropy / self.kept if self.kept else 0.0

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
        )

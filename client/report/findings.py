"""Gathers the contents of a RUN's report, in one pass over its trajectories.

In: a RUN. Out: `Findings`: counts, curves, the tokens that diverge most, and a few whole trajectories. Memory holds one
part of the RUN, a fixed number of counters, one key per trajectory, and the trajectories shown. `client.report.results`
reads what the trainer left in the RUN.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from client.contrast import Contrast, kl_lower_bound
from client.protocol.requests import Trajectory
from client.report.analysis import BetaBand, BetaBands, StepAnalysis
from client.report.results import (
    AccuracyCurve,
    EvaluatedBenchmark,
    HeldOutPoint,
    ShownTraining,
    accuracy_curves,
    evaluated_benchmarks,
    held_out_of,
    losses_of,
    shown_training,
)
from client.runs.build import trajectory_parts
from client.runs.keys import Key
from client.runs.manifest import RunManifest
from client.runs.run import Run, RunTotals
from client.runs.samples import Sample, sample_of, sampled_groups
from client.runs.tally import Tally

DRAWN, MOST_DIVERGENT, DIVERGENT_TOKENS = 5, 3, 25
"""Numbers that a report shows: drawn trajectories, most divergent trajectories, most divergent tokens."""


@dataclass(frozen=True)
class TokenDivergence:
    """The divergence of one token of the vocabulary, over the steps with this token."""

    token_id: int
    seen: int
    kept: int
    mean_kl: float  # nats
    share: float  # of the whole RUN's divergence
    mean_log_ratio: float  # log pi_E - log pi_A of the token itself, nats; NaN if never in the top k


@dataclass(frozen=True)
class PlausibleSets:
    """Plausible sets and labels under other alphas, at the steps with a bound above beta."""

    alphas: npt.NDArray[np.float64]  # [m], ascending
    mean_size: npt.NDArray[np.float64]  # [m], plausible ids among the top k
    labelled: npt.NDArray[np.float64]  # [m], mean labelled ids of the steps that would be kept; 0 if none
    whole: npt.NDArray[np.float64]  # [m], share of the steps whose set is proved complete


@dataclass(frozen=True)
class Findings:
    """A RUN's report, in numbers."""

    url: str
    manifest: RunManifest
    sealed: bool
    tally: Tally
    totals: RunTotals
    failures: list[tuple[str, int]]  # reason, how many; most first
    plausible_sets: PlausibleSets | None  # None: no step is above beta
    tokens: list[TokenDivergence]
    counts: TokenCounts
    steps: StepAnalysis
    bands: list[BetaBand]
    drawn: list[Sample]
    most_divergent: list[Sample]
    trajectories: dict[Key, Trajectory]  # of `drawn` and `most_divergent`
    questions: dict[Key, str]
    losses: list[tuple[float, float]]  # optimizer step, loss
    held_out: list[HeldOutPoint]
    training: ShownTraining | None  # None: early versions did not record it
    benchmarks: list[EvaluatedBenchmark]
    curves: list[AccuracyCurve]


class AlphaCurves:
    """Counts plausible sets for many alphas at once."""

    def __init__(self, manifest: RunManifest) -> None:
        self._manifest = manifest
        self.alphas = np.union1d(np.geomspace(0.01, 1.0, 33), [manifest.alpha])
        self._ids, self._open, self._labelled, self._kept = (np.zeros(len(self.alphas) + 1, np.int64) for _ in range(4))
        self._steps = 0

    def add(self, log_p: npt.NDArray[Any], log_q: npt.NDArray[Any]) -> None:
        """Count n steps. `log_p`, `log_q`: both models' log-probabilities, [n, k] each."""
        ratio = log_p.astype(np.float64) - log_p.max(axis=1, keepdims=True)
        known = np.isfinite(log_q)
        unknown = np.where(known, -np.inf, ratio).max(axis=1, initial=-np.inf)
        last = ratio[:, -1] if log_p.shape[1] < self._manifest.expert.vocab_size else np.full(len(ratio), -np.inf)
        still_open = np.maximum(unknown, last)  # up to this alpha the set is not proved complete
        self._ids += self._up_to(ratio.ravel())
        self._open += self._up_to(still_open)
        labelled = np.where(known, ratio, -np.inf)
        if self._manifest.keep_incomplete:
            self._labelled += self._up_to(labelled.ravel())
            self._kept += self._up_to(labelled.max(axis=1, initial=-np.inf))
        else:  # an id is labelled at the alphas that it reaches and at which its step's set is complete
            too_early = self._up_to(np.minimum(labelled, still_open[:, None]).ravel())
            self._labelled += self._up_to(labelled.ravel()) - too_early
            self._kept += self._up_to(np.zeros(len(ratio))) - self._up_to(still_open)
        self._steps += len(ratio)

    def result(self) -> PlausibleSets | None:
        """The curves; None if no step was counted."""
        if not self._steps:
            return None
        counts = self._ids, self._open, self._labelled, self._kept
        ids, still_open, labelled, kept = (one[::-1].cumsum()[::-1][1:] for one in counts)
        size, still_open = ids / self._steps, still_open / self._steps
        return PlausibleSets(self.alphas, size, labelled / np.maximum(kept, 1), 1.0 - still_open)

    def _up_to(self, ratio: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """How many of the ratios reach exactly the first j alphas, for every j: [m + 1]."""
        return np.bincount(
            np.searchsorted(np.log(self.alphas), ratio, side="right"), minlength=len(self.alphas) + 1
        ).astype(np.int64)


class TokenCounts:
    """Adds up divergence by the token of each step, with a few numbers per id of the vocabulary."""

    def __init__(self, vocab_size: int) -> None:
        self.seen, self.kept, self._ratios = (np.zeros(vocab_size, np.int64) for _ in range(3))
        self.kl, self._ratio = np.zeros(vocab_size), np.zeros(vocab_size)

    def add(self, trajectory: Trajectory, bounds: npt.NDArray[Any], steps: npt.NDArray[Any], first_step: int) -> None:
        """Count the steps from `first_step` on. `bounds`: their KL bounds. `steps`: the kept steps."""
        ids = trajectory.token_ids[first_step:]
        np.add.at(self.seen, ids, 1)
        np.add.at(self.kl, ids, bounds)
        np.add.at(self.kept, trajectory.token_ids[steps], 1)
        log_p, log_q = trajectory.expert_logprobs[first_step:], trajectory.amateur_logprobs[first_step:]
        rows, columns = np.nonzero((trajectory.top_ids[first_step:] == ids[:, None]) & np.isfinite(log_q))
        np.add.at(self._ratios, ids[rows], 1)
        np.add.at(self._ratio, ids[rows], log_p[rows, columns] - log_q[rows, columns])

    def most(self, count: int) -> list[TokenDivergence]:
        """The tokens with the largest total divergence, the largest first."""
        whole = self.kl.sum()
        order = np.argsort(-self.kl, kind="stable")[:count]
        return [
            TokenDivergence(
                token_id=int(token),
                seen=int(self.seen[token]),
                kept=int(self.kept[token]),
                mean_kl=float(self.kl[token] / self.seen[token]),
                share=float(self.kl[token] / whole),
                mean_log_ratio=float(self._ratio[token] / self._ratios[token]) if self._ratios[token] else np.nan,
            )
            for token in order
            if self.seen[token] and self.kl[token] > 0
        ]


class Largest:
    """The `count` trajectories with the largest scores. Memory holds only these."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[float, Key, Trajectory]] = []

    def add(self, score: float, trajectory: Trajectory) -> None:
        key = (trajectory.problem_id, trajectory.sample_index)
        if len(self._heap) == self._count and (score, key) <= self._heap[0][:2]:
            return
        arrays = {name: getattr(trajectory, name).copy() for name in Trajectory.ARRAYS}  # a view keeps its part alive
        heapq.heappush(self._heap, (score, key, replace(trajectory, **arrays)))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    def result(self) -> list[Trajectory]:
        """The trajectories, the largest score first."""
        return [trajectory for _, _, trajectory in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


def gather(run: Run) -> Findings:
    """Read a RUN. Raises RunError if there is none, or if it has no trajectories, or one that no model can produce."""
    manifest = run.manifest()
    first = manifest.first_step
    tally, alphas = Tally(manifest), AlphaCurves(manifest)
    tokens, steps = TokenCounts(manifest.expert.vocab_size), StepAnalysis(first)
    bands = BetaBands(manifest.beta)
    drawn, divergent = Largest(DRAWN), Largest(MOST_DIVERGENT)
    trajectory_parts(run, manifest)
    for trajectory, kept in _counted(run, manifest, tally):
        log_p, log_q = trajectory.expert_logprobs[first:], trajectory.amateur_logprobs[first:]
        bounds = kl_lower_bound(log_p, log_q)
        above = bounds > manifest.beta
        alphas.add(log_p[above], log_q[above])
        tokens.add(trajectory, bounds, kept.steps, first)
        steps.add(trajectory.expert_logprobs, trajectory.amateur_logprobs, kept.steps)
        bands.add(trajectory.token_ids, bounds, first, int(_lot(trajectory)))
        if len(bounds):
            drawn.add(_lot(trajectory), trajectory)
            divergent.add(float(bounds.mean()), trajectory)
    shown = {(t.problem_id, t.sample_index): t for t in [*drawn.result(), *divergent.result()]}
    failed = run.failures()
    reasons = Counter(failure.type for key, failure in failed.items() if key not in tally.keys)
    return Findings(
        url=str(run),
        manifest=manifest,
        sealed=run.completion() is not None,
        tally=tally,
        totals=tally.totals(set(failed)),
        failures=reasons.most_common(),
        plausible_sets=alphas.result(),
        tokens=tokens.most(DIVERGENT_TOKENS),
        counts=tokens,
        steps=steps,
        bands=bands.bands,
        drawn=[sample_of(trajectory, manifest) for trajectory in drawn.result()],
        most_divergent=[sample_of(trajectory, manifest) for trajectory in divergent.result()],
        trajectories=shown,
        questions=run.questions(set(shown)),
        losses=losses_of(run),
        held_out=held_out_of(run),
        training=shown_training(run),
        benchmarks=evaluated_benchmarks(run),
        curves=accuracy_curves(run),
    )


def _counted(run: Run, manifest: RunManifest, tally: Tally) -> Iterator[tuple[Trajectory, Contrast]]:
    """Add every trajectory to the tally, and yield it with its contrast."""
    for group in sampled_groups(run.trajectories(), manifest):
        tally.add(group)
        for trajectory, sample in zip(group.trajectories, group.samples, strict=True):
            yield trajectory, sample.contrast


def _lot(trajectory: Trajectory) -> float:
    """A pseudo-random number that depends only on the trajectory's key, so that a report can be repeated."""
    key = orjson.dumps([trajectory.problem_id, trajectory.sample_index])
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "little")

"""Gathers the contents of a RUN's report, in one pass over its trajectories.

In: a RUN. Out: `Findings`: counts, curves, the tokens that diverge most, and a few whole trajectories. Memory holds one
part of the RUN, a fixed number of counters, one key per trajectory, and the trajectories shown. It also reads what the
trainer may have written to the RUN: training/metrics.jsonl (one line per optimizer step, with `step` and `loss`),
training/held_out.jsonl (one line per measurement) and evaluation/*.json (`benchmarks`: name -> `n`, `accuracy`,
`interval`, perhaps `before`).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from client.contrast import Contrast, kl_lower_bound
from client.protocol.requests import Trajectory
from client.report.analysis import BetaBand, BetaBands, StepAnalysis
from client.runs.build import trajectory_parts
from client.runs.keys import Key
from client.runs.manifest import RunManifest
from client.runs.parts import MOST_PART_BYTES
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
class HeldOutPoint:
    """A training's figures on its held-out trajectories, after `step` optimizer steps."""

    step: float
    loss: float  # nats, as the next two
    shift: float  # from the base, at kept steps
    other_shift: float  # at the other steps
    agreement: float  # share of the kept steps
    score: float  # decides `train --keep best`; lower is better
    best: float  # 1 if the training found this measurement the best


@dataclass(frozen=True)
class EvaluatedBenchmark:
    """The trainer's result on a benchmark: accuracies with 95% intervals."""

    file: str
    name: str
    n: int
    accuracy: tuple[float, float, float]  # value, low, high
    before: tuple[float, float, float] | None
    p: float | None  # McNemar's, of the two on the same problems


@dataclass(frozen=True)
class CurvePoint:
    """One checkpoint on a benchmark: the optimizer step, and what the evaluation found."""

    step: int
    accuracy: tuple[float, float, float]  # value, low, high
    fixed: int | None  # None: the base, or several samples per problem
    broken: int | None


@dataclass(frozen=True)
class AccuracyCurve:
    """The checkpoints of one training on a benchmark, by optimizer step."""

    file: str
    name: str
    points: list[CurvePoint]


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
    benchmarks: list[EvaluatedBenchmark]
    curves: list[AccuracyCurve]


HELD_OUT_FIGURES = tuple(field.name for field in fields(HeldOutPoint))


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
        losses=[(step, loss) for step, loss in _training_figures(run, "metrics.jsonl", ("step", "loss"))],
        held_out=[HeldOutPoint(*row) for row in _training_figures(run, "held_out.jsonl", HELD_OUT_FIGURES, _scored)],
        benchmarks=_evaluated_benchmarks(run),
        curves=_accuracy_curves(run),
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


def _scored(row: dict[str, Any]) -> dict[str, Any]:
    """A line of held_out.jsonl, with loss plus shift at other steps as its score if it was written without one."""
    return {"score": row["loss"] + row["other_shift"], "best": False} | row


def _training_figures(
    run: Run, file: str, names: Sequence[str], completed: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> list[list[float]]:
    """The named figures of each line of a file that the trainer wrote. Torn or incomplete lines are skipped."""
    found = []
    for line in (run.bucket.get(f"training/{file}", MOST_PART_BYTES) or b"").splitlines():
        try:
            row = completed(orjson.loads(line))
            figures = [float(row[name]) for name in names]
            if math.isfinite(sum(figures)):
                found.append(figures)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _evaluated_benchmarks(run: Run) -> list[EvaluatedBenchmark]:
    """Every benchmark of every evaluation. Files with other contents are skipped."""
    found = []
    for file in run.bucket.names("evaluation"):
        try:
            found += [
                _evaluated_benchmark(file, name, figures)
                for name, figures in orjson.loads(run.bucket.get(file, MOST_PART_BYTES) or b"")["benchmarks"].items()
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _accuracy_curves(run: Run) -> list[AccuracyCurve]:
    """The curve of every benchmark of every evaluation that has one. Files with other contents are skipped."""
    found = []
    for file in run.bucket.names("evaluation"):
        try:
            curves = orjson.loads(run.bucket.get(file, MOST_PART_BYTES) or b"").get("curve", {})
            found += [
                AccuracyCurve(file, str(name), sorted(map(_curve_point, points), key=lambda point: point.step))
                for name, points in curves.items()
                if len(points) > 1
            ]
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _curve_point(figures: Any) -> CurvePoint:
    paired, step = figures.get("paired") or {}, int(figures["step"])
    fixed, broken = (int(paired[name]) if name in paired else None for name in ("fixed", "broken"))
    if step < 0:
        raise ValueError(f"{step} is not an optimizer step")
    return CurvePoint(step, _accuracy(figures), fixed, broken)


def _evaluated_benchmark(file: str, name: str, figures: Any) -> EvaluatedBenchmark:
    before = _accuracy(figures["before"]) if figures.get("before") else None
    p = float(figures["paired"]["p"]) if figures.get("paired") else None
    n = int(figures["n"])
    if n < 0 or not (p is None or 0 <= p <= 1):
        raise ValueError(f"{figures} are no figures of a benchmark")
    return EvaluatedBenchmark(file, str(name), n, _accuracy(figures), before, p)


def _accuracy(figures: Any) -> tuple[float, float, float]:
    low, high = figures["interval"]
    if not 0 <= low <= figures["accuracy"] <= high <= 1:
        raise ValueError(f"{figures} is not an accuracy in its interval")
    return float(figures["accuracy"]), float(low), float(high)

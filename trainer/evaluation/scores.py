"""Statistics of verdicts: accuracy with its interval, pass@k, and the difference of two models on the same problems.

In: verdicts, a list of samples for each problem. Out: figures. Knows nothing of models or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest, norm

from trainer.evaluation.records import Record

NORMAL = float(norm.ppf(0.975))
"""Standard deviations on each side of a 95% interval."""
EXAMPLES = 3
"""Examples of each kind in a comparison."""


@dataclass(frozen=True)
class Score:
    """The correct outputs of n problems. Accuracy is pass@1; `interval` is its 95% interval over problems."""

    n: int
    samples: int  # per problem
    correct: int  # of n * samples
    interval: tuple[float, float]
    pass_at: dict[int, float]  # by k, if there are several samples

    @property
    def accuracy(self) -> float:
        return self.correct / (self.n * self.samples)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}]"

    def to_json(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"correct": self.correct, "accuracy": self.accuracy, "interval": list(self.interval)}
        if self.samples > 1:
            figures |= {"samples": self.samples, "pass_at": {str(k): value for k, value in self.pass_at.items()}}
        return figures


@dataclass(frozen=True)
class Paired:
    """Two models on the same problems, one output each: how many problems the second one fixed and broke, and McNemar's
    exact two-sided p.
    """

    fixed: int
    broken: int
    p: float


@dataclass(frozen=True)
class ModelResult:
    """One model's result on a benchmark, compared with the base unless it is the base."""

    model: str
    score: Score
    paired: Paired | None = None  # None for the base, or with several samples per problem
    fixed: tuple[tuple[Record, Record], ...] = ()  # examples: the base's output, and this model's
    broken: tuple[tuple[Record, Record], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"n": self.score.n, **self.score.to_json(), **({"paired": vars(self.paired)} if self.paired else {})}


@dataclass(frozen=True)
class Comparison:
    """A benchmark's results: the base's first, then the others'."""

    benchmark: str
    results: list[ModelResult]

    def to_json(self) -> dict[str, Any]:
        """The last model's figures. If it is not the base, the base's figures are in `before`."""
        base, last = self.results[0], self.results[-1]
        return last.to_json() | ({} if last is base else {"before": base.score.to_json()})


def score(verdicts: Sequence[Sequence[bool]]) -> Score:
    """Count `verdicts[problem][sample]`; every problem has the same number of samples.

    pass@k is the unbiased estimate of Chen et al., arXiv 2107.03374.
    """
    n, samples = len(verdicts), len(verdicts[0])
    right = [sum(problem) for problem in verdicts]
    ks = sorted({k for k in (1, 2, 4, 8, 16, 32, 64, 128, samples) if k <= samples}) if samples > 1 else []
    pass_at = {k: float(np.mean([pass_at_k(samples, count, k) for count in right])) for k in ks}
    return Score(n, samples, sum(right), _interval(np.array(right) / samples, samples), pass_at)


def _interval(rates: npt.NDArray[np.float64], samples: int) -> tuple[float, float]:
    """Wilson's 95% interval (1927) of the mean of `rates`, one per problem. It is valid near 0 and 1 too.

    Samples of one problem are not independent. So Wilson's n is the effective number of samples, at which the binomial
    variance of the mean is its variance between problems: at least one per problem, at most all (Korn and Graubard,
    Survey Methodology 24 (1998) 193).
    """
    n, mean = len(rates), float(rates.mean())
    spread, most = mean * (1 - mean), n * samples
    variance = float(rates.var(ddof=1)) / n if n > 1 else 0.0
    count = n if spread == 0 or n == 1 else min(max(spread / variance, n), most) if variance else most
    room = NORMAL**2 / count
    middle = (mean + room / 2) / (1 + room)
    half = (room * spread + room**2 / 4) ** 0.5 / (1 + room)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The probability that one of k samples is correct, drawn without replacement from n of which `correct` are."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare verdicts on the same problems: McNemar's exact test, binomial on the problems where they differ."""
    fixed = sum(now and not then for then, now in zip(before, after, strict=True))
    broken = sum(then and not now for then, now in zip(before, after, strict=True))
    p = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    return Paired(fixed, broken, float(p))


def comparison_of(benchmark: str, models: Sequence[tuple[str, list[list[Record]]]]) -> Comparison:
    """A benchmark's results from each model's records, `records[problem][sample]`; the first model is the base."""
    results: list[ModelResult] = []
    base = models[0][1]
    for model, records in models:
        counted = score([[record.correct for record in samples] for samples in records])
        if records is base or counted.samples > 1:
            results.append(ModelResult(model, counted))
            continue
        both = [(then[0], now[0]) for then, now in zip(base, records, strict=True)]
        tested = paired([then.correct for then, _ in both], [now.correct for _, now in both])
        fixed = [pair for pair in both if not pair[0].correct and pair[1].correct]
        broken = [pair for pair in both if pair[0].correct and not pair[1].correct]
        results.append(ModelResult(model, counted, tested, tuple(fixed[:EXAMPLES]), tuple(broken[:EXAMPLES])))
    return Comparison(benchmark, results)

"""What can be said from verdicts: accuracy with its interval, and whether two models differ on the same problems.

In: a verdict a problem. Out: scores, as values, as JSON and as a table. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from scipy.stats import binomtest


@dataclass(frozen=True)
class Score:
    """Correct answers out of n, and the 95% Wilson interval of the accuracy."""

    n: int
    correct: int
    interval: tuple[float, float]

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class Paired:
    """Two models on the same problems: what the second fixed, what it broke, McNemar's exact two-sided p."""

    fixed: int
    broken: int
    p: float


@dataclass(frozen=True)
class BenchmarkResult:
    """A benchmark's score; with an adapter it is the adapted model's, and `before` the base's."""

    name: str
    score: Score
    before: Score | None = None
    paired: Paired | None = None

    def to_json(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"n": self.score.n, **_figures(self.score)}
        if self.before and self.paired:
            figures |= {"before": _figures(self.before), "paired": vars(self.paired)}
        return figures


def score(verdicts: Sequence[bool]) -> Score:
    """Count; the interval is Wilson's (1927), which holds near 0 and 1 where the normal one does not."""
    interval = binomtest(sum(verdicts), len(verdicts)).proportion_ci(confidence_level=0.95, method="wilson")
    return Score(len(verdicts), sum(verdicts), (float(interval.low), float(interval.high)))


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compare verdicts on the same problems: McNemar's exact test, binomial on those where the two differ."""
    fixed = sum(now and not then for then, now in zip(before, after, strict=True))
    broken = sum(then and not now for then, now in zip(before, after, strict=True))
    p = binomtest(fixed, fixed + broken).pvalue if fixed + broken else 1.0
    return Paired(fixed, broken, float(p))


def result(name: str, verdicts: Sequence[bool], before: Sequence[bool] | None = None) -> BenchmarkResult:
    """A benchmark's result from its verdicts, and those of the base model where there are two."""
    if before is None:
        return BenchmarkResult(name, score(verdicts))
    return BenchmarkResult(name, score(verdicts), score(before), paired(before, verdicts))


def table(results: Sequence[BenchmarkResult]) -> Table:
    """The results as the terminal shows them."""
    compared = any(result.before for result in results)
    columns = ("before", "after", "fixed", "broken", "McNemar's p") if compared else ("accuracy",)
    shown = Table("benchmark", title="greedy pass@1, 95% intervals")
    for column in ("n", *columns):
        shown.add_column(column, justify="right")
    for result in results:
        cells = [result.name, str(result.score.n)]
        if result.before and result.paired:
            pair = result.paired
            cells += [str(result.before), str(result.score), str(pair.fixed), str(pair.broken), f"{pair.p:.2g}"]
        else:
            cells.append(str(result.score))
        shown.add_row(*cells)
    return shown


def _figures(score: Score) -> dict[str, Any]:
    return {"correct": score.correct, "accuracy": score.accuracy, "interval": list(score.interval)}

"""Selects the trajectories that a client has to sample: those of its shard that are not settled.

In: problems, a RUN. Out: problems, keys. Never writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from client.errors import LightReasonerError
from client.problems.problem_set import ProblemSet
from client.runs.keys import Key, Keys
from client.runs.run import Run


@dataclass(frozen=True)
class Shard:
    """Every `count`-th problem, beginning with number `index`, which counts from 1.

    Problems are in the order of their ids, because clients may hold the same problems in different orders.
    """

    index: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from 'i/n'. Raises LightReasonerError."""
        index, slash, count = text.partition("/")
        if slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count):
            return cls(int(index), int(count))
        raise LightReasonerError(f"--shard: {text!r} is not a shard; give i/n with i from 1 to n, for example 2/3")

    def of(self, problems: ProblemSet) -> ProblemSet:
        if self.count == 1:
            return problems
        return problems.only(set(sorted(problems.ids)[self.index - 1 :: self.count]).__contains__)


WHOLE_SET = Shard()


@dataclass(frozen=True)
class Settled:
    """The keys that need no sampling: those in the RUN, and those that failed."""

    there: Keys
    failed: Keys

    def __contains__(self, key: object) -> bool:
        return key in self.there or key in self.failed

    def __len__(self) -> int:
        return len(self.there) + len(self.failed)


def keys_of(problems: ProblemSet, n: int) -> Iterator[Key]:
    """The keys of all n trajectories of each problem."""
    return ((problem_id, index) for problem_id in problems.ids for index in range(n))


def settled(run: Run, problems: ProblemSet, n: int) -> Settled:
    """Which of the problems' keys are settled in a RUN. A key that failed and succeeded later counts as there."""
    had, failures = run.keys(), run.failures()
    there = Keys(key for key in keys_of(problems, n) if key in had)
    return Settled(there, Keys(key for key in keys_of(problems, n) if key in failures and key not in there))

"""Which trajectories one client of a RUN has to ask for: its shard of the problems, less what is settled.

In: problems, a RUN. Out: problems, keys. Never writes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from client.errors import LightReasonerError
from client.protocol import Problem
from client.run import Run
from client.samples import Key


@dataclass(frozen=True)
class Shard:
    """Every `count`-th problem by id, beginning with the `index`-th, which counts from 1.

    By id, for clients may have the same problems in different orders.
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
        raise LightReasonerError(f"--shard: {text!r} is no shard; give i/n with i from 1 to n, as 2/3")

    def of(self, problems: list[Problem]) -> list[Problem]:
        if self.count == 1:
            return problems
        mine = set(sorted(problem.id for problem in problems)[self.index - 1 :: self.count])
        return [problem for problem in problems if problem.id in mine]


WHOLE = Shard()


@dataclass(frozen=True)
class Settled:
    """The keys that a RUN needs no more of: those it holds, and those that failed for good."""

    there: frozenset[Key]
    failed: frozenset[Key]

    @property
    def keys(self) -> frozenset[Key]:
        return self.there | self.failed


def keys_of(problems: Iterable[Problem], n: int) -> set[Key]:
    """The keys of all n trajectories of each problem."""
    return {(problem.id, index) for problem in problems for index in range(n)}


def settled(run: Run, keys: set[Key]) -> Settled:
    """What of some keys is settled in a RUN; a key that failed and was had after all is there."""
    there = run.keys() & keys
    return Settled(frozenset(there), frozenset(run.failures().keys() & keys - there))

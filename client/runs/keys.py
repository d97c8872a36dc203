"""Keys of trajectories, and sets of keys that need little memory for a hundred thousand problems."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set

Key = tuple[str, int]
"""(problem_id, sample_index)."""


class Keys(Set[Key]):
    """A set that only grows. For each problem it holds the id, and the sample indices as the bits of a number.

    `expected`: ids that keys will have; the set then uses these strings and holds no copies.
    """

    def __init__(self, keys: Iterable[Key] = (), expected: Iterable[str] = ()) -> None:
        self._samples = dict.fromkeys(expected, 0)
        self._count = 0
        for key in keys:
            self.add(key)

    def add(self, key: Key) -> bool:
        """Add a key; returns whether it is new."""
        problem_id, index = key
        had = self._samples.get(problem_id, 0)
        has = had | 1 << index
        if new := has != had:
            self._samples[problem_id] = has
            self._count += 1
        return new

    @property
    def problems(self) -> int:
        """How many problems have a key here."""
        return sum(samples > 0 for samples in self._samples.values())

    def __contains__(self, key: object) -> bool:
        match key:
            case (str(problem_id), int(index)):
                return bool(self._samples.get(problem_id, 0) >> index & 1)
        return False

    def __iter__(self) -> Iterator[Key]:
        for problem_id, samples in self._samples.items():
            for index in range(samples.bit_length()):
                if samples >> index & 1:
                    yield problem_id, index

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"Keys({list(self)})"

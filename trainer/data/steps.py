"""Which trajectories each optimizer step trains on, and this rank's share of it.

In: a training set, which may still grow; a recipe; this rank's number. Out: optimizer steps as micro-batches. A step
depends only on the recipe, its number, and the examples in order: by their keys, or with `--follow` as their parts
arrived. So a resumed training continues with the same steps, and all ranks agree without asking.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypedDict

import numpy as np
from torch.utils.data import IterableDataset

from trainer.data.dataset import TrainingSet
from trainer.data.example import Example
from trainer.data.packing import Batch, Layout, micro_batches
from trainer.settings import Recipe, Unit


class Step(TypedDict):
    """One optimizer step: this rank's micro-batches, and the counts of all ranks together."""

    micro_batches: list[Batch]
    kept_steps: int
    tokens: int
    epoch: float


class Source(Protocol):
    """Adds examples to a training set while its RUN is sampled."""

    def more(self) -> bool:
        """Wait for new examples. False: there will be no more."""


@dataclass
class Steps(IterableDataset[Step]):
    """The optimizer steps of a training, from step `first` on.

    Each epoch takes every unit once, in a random order that depends on seed and epoch. With a source, the first epoch
    takes the units as they arrive. The last step of an epoch has the units that are left.
    """

    training_set: TrainingSet
    recipe: Recipe
    token_budget: int
    rank: int = 0
    ranks: int = 1
    source: Source | None = None
    first: int = 0
    layout: Layout = field(default_factory=Layout)
    _made_order: tuple[tuple[int, int], np.ndarray] | None = field(default=None, init=False, repr=False)

    @property
    def units(self) -> int:
        """Units per epoch, as far as they are known."""
        by_step = self.recipe.unit == Unit.STEP
        return self.training_set.kept_steps if by_step else len(self.training_set.examples)

    def total(self, units: int | None = None) -> int:
        """The number of optimizer steps. `units`: units per epoch; None: those known."""
        return self.recipe.max_steps or math.ceil(self.recipe.epochs * self._steps_per_epoch(units or self.units))

    def __iter__(self) -> Iterator[Step]:
        for index in itertools.count(self.first):
            if (examples := self._examples_of(index)) is None:
                return
            yield Step(
                micro_batches=micro_batches(examples, self.token_budget, self.ranks, self.layout)[self.rank],
                kept_steps=sum(len(example.positions) for example in examples),
                tokens=sum(len(example.input_ids) for example in examples),
                epoch=(index + 1) / self._steps_per_epoch(self.units),
            )

    def lengths(self) -> np.ndarray:
        """Tokens of each known unit: [units]."""
        examples = self.training_set.examples
        if self.recipe.unit == Unit.STEP:
            return np.concatenate([np.asarray(example.positions) + 1 for example in examples] or [np.zeros(0, int)])
        return np.array([len(example.input_ids) for example in examples], int)

    def _examples_of(self, index: int) -> list[Example] | None:
        """The examples of a step; None after the last step."""
        if self.recipe.max_steps is not None and index >= self.recipe.max_steps:
            return None
        size = self.recipe.batch_size
        growing = self.source is not None
        while growing and self.units < (index + 1) * size:
            assert self.source is not None
            growing = self.source.more()
        if self.source is not None and index * size < self.units:
            return [self._unit(unit) for unit in range(index * size, min((index + 1) * size, self.units))]
        if not self.units or index >= self.total():
            return None
        epoch, place = divmod(index, self._steps_per_epoch(self.units))
        return [self._unit(int(unit)) for unit in self._order(epoch)[place * size : (place + 1) * size]]

    def _order(self, epoch: int) -> np.ndarray:
        """The order of an epoch's units, computed once an epoch, not once a step."""
        if self._made_order is None or self._made_order[0] != (epoch, self.units):
            order = np.random.default_rng([self.recipe.seed, epoch]).permutation(self.units)
            self._made_order = (epoch, self.units), order
        return self._made_order[1]

    def _unit(self, unit: int) -> Example:
        if self.recipe.unit == Unit.TRAJECTORY:
            return self.training_set.examples[unit]
        ends = self.training_set.ends
        owner = bisect_right(ends, unit)
        example = self.training_set.examples[owner]
        return example.only(unit - ends[owner] + len(example.positions))

    def _steps_per_epoch(self, units: int) -> int:
        return max(1, math.ceil(units / self.recipe.batch_size))

"""Divides the examples of an optimizer step into micro-batches for each rank: packed, or padded if the model needs it.

In: examples, a token budget, the number of ranks. Out: micro-batches of tensors. A pure function: every rank computes
the same result without asking the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from trainer.data.example import Example, Ints

MOST_UNEQUAL = 2
"""The longest padded row of a pass is at most this many times as long as the shortest; more would mostly be padding."""


class Sharing(StrEnum):
    """How examples share a forward pass: in one sequence; in a row each, padded on the right; not at all."""

    PACKED = "packed"
    PADDED = "padded"
    ALONE = "alone"


@dataclass(frozen=True)
class Layout:
    """Which examples may share a forward pass, and how."""

    sharing: Sharing = Sharing.PACKED
    switch: int | None = None  # longer examples have other position tables (LongRoPE): no pass holds both kinds

    def sides(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices into `lengths`, in groups. Only examples of the same group may share a pass."""
        if self.switch is None:
            return [list(range(len(lengths)))]
        longer = [length > self.switch for length in lengths]
        return [[index for index, long in enumerate(longer) if long == side] for side in (True, False)]

    def tokens(self, lengths: Sequence[int]) -> int:
        """Tokens of a pass with examples of these lengths, padding included."""
        return len(lengths) * max(lengths) if self.sharing == Sharing.PADDED else sum(lengths)

    def alike(self, length: int, longest: int) -> bool:
        """Whether an example of `length` tokens may share a pass with a longest of `longest`: a padded row must not be
        mostly padding.
        """
        return self.sharing != Sharing.PADDED or longest <= MOST_UNEQUAL * length


class Batch(TypedDict):
    """The examples of a pass: R rows of L tokens (one row if packed), K kept steps, labels of at most m ids."""

    input_ids: Tensor  # [R, L]
    position_ids: Tensor  # [R, L], restarting at 0 for each example
    kept: Tensor  # [K], indices into the tokens, row by row
    label_ids: Tensor  # [K, m]
    label_weights: Tensor  # [K, m]; 0 where a label has fewer than m ids


def micro_batches(
    examples: Sequence[Example], token_budget: int, ranks: int = 1, layout: Layout | None = None
) -> list[list[Batch]]:
    """The micro-batches of each rank. All ranks get the same number.

    A micro-batch has at most `token_budget` tokens, padding included, unless one example alone has more. It follows
    `layout`; None: packed. Each example goes to the rank with the fewest tokens, and there into the first pass with
    room, the longest examples first, so that rows of similar length share a pass. A rank with less work gets passes
    that add nothing to loss or gradient, because all ranks must take part in every exchange.
    """
    layout = layout or Layout()
    loads: list[list[Example]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for example in sorted(examples, key=lambda example: -len(example.input_ids)):
        lightest = tokens.index(min(tokens))
        loads[lightest].append(example)
        tokens[lightest] += len(example.input_ids)
    bins = [_bins(load, token_budget, layout) for load in loads]
    most = max(map(len, bins))
    padded = layout.sharing == Sharing.PADDED
    return [[pack(held, padded) for held in mine] + [_idle(examples[0])] * (most - len(mine)) for mine in bins]


def passes(examples: Sequence[Example], token_budget: int, layout: Layout) -> list[list[int]]:
    """The passes of a single rank, each as indices into `examples`; the longest examples come first."""
    places = {id(example): place for place, example in enumerate(examples)}
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    return [[places[id(example)] for example in held] for held in _bins(ordered, token_budget, layout)]


def pack(examples: Sequence[Example], padded: bool = False) -> Batch:
    """Put examples into one pass: one after the other in one sequence, or with `padded` a row each."""
    input_ids, position_ids, starts = arrange([example.input_ids for example in examples], padded)
    sizes = np.concatenate([np.diff(example.label_offsets) for example in examples])
    filled = np.arange(sizes.max()) < sizes[:, None]  # [K, m]
    label_ids, label_weights = np.zeros(filled.shape, np.int64), np.zeros(filled.shape, np.float32)
    label_ids[filled] = np.concatenate([example.label_ids for example in examples])
    label_weights[filled] = np.concatenate([example.label_weights for example in examples])
    kept = np.concatenate([start + example.positions for start, example in zip(starts, examples, strict=True)])
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        kept=torch.from_numpy(kept),
        label_ids=torch.from_numpy(label_ids),
        label_weights=torch.from_numpy(label_weights),
    )


def arrange(sequences: Sequence[Ints], padded: bool) -> tuple[Tensor, Tensor, Ints]:
    """Ids and positions of a pass, both [R, L], and the index where each sequence begins, counted row by row.

    The pass has no attention_mask and no cache. transformers then allows no attention between packed sequences, because
    positions restart. In a causal model no token sees padding on its right.
    """
    lengths = [len(sequence) for sequence in sequences]
    if not padded:
        positions = np.concatenate([np.arange(length) for length in lengths])
        starts = np.cumsum([0, *lengths[:-1]])
        return torch.from_numpy(np.concatenate(sequences))[None], torch.from_numpy(positions)[None], starts
    ids = np.zeros((len(sequences), max(lengths)), np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    positions = np.tile(np.arange(max(lengths)), (len(sequences), 1))
    return torch.from_numpy(ids), torch.from_numpy(positions), np.arange(len(sequences)) * max(lengths)


def _bins(examples: Sequence[Example], budget: int, layout: Layout) -> list[list[Example]]:
    """The examples of each pass, the longest first if `examples` are."""
    if layout.sharing == Sharing.ALONE:
        return [[example] for example in examples]
    sides = layout.sides([len(example.input_ids) for example in examples])
    return [filled for side in sides for filled in _first_fit([examples[index] for index in side], budget, layout)]


def _first_fit(examples: Sequence[Example], budget: int, layout: Layout) -> list[list[Example]]:
    """Put each example into the first pass with room. With the longest first, a pass's first example sets its width."""
    padded = layout.sharing == Sharing.PADDED
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example.input_ids)
        longest = [len(held[0].input_ids) for held in bins]
        needs = longest if padded else [size] * len(bins)
        fits = next(
            (index for index, left in enumerate(room) if needs[index] <= left and layout.alike(size, longest[index])),
            None,
        )
        if fits is None:
            bins.append([example])
            room.append(budget - size)
        else:
            bins[fits].append(example)
            room[fits] -= needs[fits]
    return bins


def _idle(example: Example) -> Batch:
    """A pass of one token whose label has weight 0: it adds nothing to loss or gradient."""
    batch = pack([example])
    return Batch(
        input_ids=batch["input_ids"][:, :1],
        position_ids=batch["position_ids"][:, :1],
        kept=torch.zeros(1, dtype=torch.int64),
        label_ids=batch["label_ids"][:1],
        label_weights=torch.zeros_like(batch["label_weights"][:1]),
    )

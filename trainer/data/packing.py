"""Packs the examples of an optimizer step into sequences: micro-batches without padding, for each rank.

In: examples, a token budget, the number of ranks. Out: micro-batches of tensors. A pure function: every rank computes
the same without asking the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from trainer.data.example import Example


@dataclass(frozen=True)
class Layout:
    """Which examples may share a forward pass."""

    packed: bool = True  # False: one example a pass
    switch: int | None = None  # longer examples have other position tables (LongRoPE): no pass holds both kinds

    def sides(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices into `lengths`, apart where no pass may hold both."""
        if self.switch is None:
            return [list(range(len(lengths)))]
        longer = [length > self.switch for length in lengths]
        return [[index for index, long in enumerate(longer) if long == side] for side in (True, False)]


class Batch(TypedDict):
    """Packed examples: L tokens, K kept steps, labels of at most m ids."""

    input_ids: Tensor  # [1, L]
    position_ids: Tensor  # [1, L], restarting at 0 for each example
    kept: Tensor  # [K], indices into the sequence
    label_ids: Tensor  # [K, m]
    label_weights: Tensor  # [K, m]; a label with fewer than m ids is filled up with weight 0


def micro_batches(
    examples: Sequence[Example], token_budget: int, ranks: int = 1, layout: Layout | None = None
) -> list[list[Batch]]:
    """The micro-batches of each rank. All ranks get the same number.

    A micro-batch has at most `token_budget` tokens, unless one example alone has more, and keeps to `layout`, by
    default a packed one. The longest examples come first:
    each goes to the rank with the fewest tokens, there into the first sequence with room. A rank with less work gets
    sequences that add nothing to loss or gradient, because all ranks must take part in every exchange.
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
    return [[pack(packed) for packed in mine] + [_idle(examples[0])] * (most - len(mine)) for mine in bins]


def pack(examples: Sequence[Example]) -> Batch:
    """Put examples one after the other into one sequence.

    transformers allows no attention between them if position_ids restart and it gets no attention_mask and no cache.
    """
    lengths = [len(example.input_ids) for example in examples]
    starts = np.cumsum([0, *lengths[:-1]])
    sizes = np.concatenate([np.diff(example.label_offsets) for example in examples])
    filled = np.arange(sizes.max()) < sizes[:, None]  # [K, m]
    label_ids, label_weights = np.zeros(filled.shape, np.int64), np.zeros(filled.shape, np.float32)
    label_ids[filled] = np.concatenate([example.label_ids for example in examples])
    label_weights[filled] = np.concatenate([example.label_weights for example in examples])
    kept = np.concatenate([start + example.positions for start, example in zip(starts, examples, strict=True)])
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([example.input_ids for example in examples]))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        kept=torch.from_numpy(kept),
        label_ids=torch.from_numpy(label_ids),
        label_weights=torch.from_numpy(label_weights),
    )


def _bins(examples: Sequence[Example], budget: int, layout: Layout) -> list[list[Example]]:
    """What each sequence holds."""
    if not layout.packed:
        return [[example] for example in examples]
    sides = layout.sides([len(example.input_ids) for example in examples])
    return [filled for side in sides for filled in _first_fit([examples[index] for index in side], budget)]


def _first_fit(examples: Sequence[Example], budget: int) -> list[list[Example]]:
    """Each example goes into the first sequence with room."""
    bins: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = len(example.input_ids)
        fits = next((index for index, left in enumerate(room) if size <= left), None)
        if fits is None:
            bins.append([example])
            room.append(budget - size)
        else:
            bins[fits].append(example)
            room[fits] -= size
    return bins


def _idle(example: Example) -> Batch:
    """One token, with a label of weight 0."""
    batch = pack([example])
    return Batch(
        input_ids=batch["input_ids"][:, :1],
        position_ids=batch["position_ids"][:, :1],
        kept=torch.zeros(1, dtype=torch.int64),
        label_ids=batch["label_ids"][:1],
        label_weights=torch.zeros_like(batch["label_weights"][:1]),
    )

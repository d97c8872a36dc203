"""Turns a RUN into what an optimizer step eats: trajectories packed into one sequence, with labels at kept steps.

In: a RUN's samples and manifest, and the folder of the model to be trained. Out: `Example` values and packed
batches of them. Refuses a RUN that is empty or another model's. Never runs a model, never writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from client.errors import RunError
from client.fingerprints import chat_template_digest, model_fingerprint, tokenizer_fingerprint
from client.protocol import ModelCard
from client.run import Run
from client.samples import Sample

Ints = npt.NDArray[np.signedinteger[Any]]
DIGITS = 12
"""Hex digits of a digest that a message shows."""


@dataclass(frozen=True)
class Example:
    """One trajectory, cut after the last position that predicts a kept step; causal models never see the rest."""

    input_ids: Ints  # [L]
    positions: Ints  # [n], where in input_ids each kept step is predicted
    label_ids: Ints  # [sum of the label sizes]
    label_weights: npt.NDArray[np.float32]  # the same shape
    label_offsets: Ints  # [n + 1]


@dataclass(frozen=True)
class TrainingSet:
    """What a RUN offers for training."""

    examples: list[Example]
    without_kept_steps: int  # trajectories left out: they would contribute nothing
    sealed: bool

    @property
    def kept_steps(self) -> int:
        return sum(len(example.positions) for example in self.examples)


class Batch(TypedDict):
    """Packed examples: L tokens in all, K kept steps, labels of at most m ids."""

    input_ids: Tensor  # [1, L]
    position_ids: Tensor  # [1, L], restarting at 0 for each example
    kept: Tensor  # [K], indices into the sequence
    label_ids: Tensor  # [K, m]
    label_weights: Tensor  # [K, m], 0 where a label has fewer ids


def read_training_set(run: Run, folder: Path, vocab_size: int) -> TrainingSet:
    """Read the examples of a RUN for the model in `folder`, whose head has `vocab_size` columns.

    Raises RunError where the RUN is missing, empty, of another expert, or holds what the model cannot have said.
    """
    check_expert(run, run.manifest().expert, folder)
    examples, empty = [], 0
    for sample in run.samples():
        if len(sample.contrast.steps):
            check_ranges(run, sample, vocab_size)
            examples.append(example_of(sample))
        else:
            empty += 1
    if not examples:
        raise RunError(_nothing_to_learn(run, empty))
    return TrainingSet(examples, empty, sealed=run.completion() is not None)


def check_expert(run: Run, expert: ModelCard, folder: Path) -> None:
    """Raises RunError naming each of weights, tokenizer and chat template that is not those of the RUN's expert."""
    compared = {
        "weights": (expert.model_fingerprint, model_fingerprint(folder)),
        "tokenizer": (expert.tokenizer_fingerprint, tokenizer_fingerprint(folder)),
        "chat template": (expert.chat_template_digest, chat_template_digest(folder)),
    }
    differences = [
        f"{what} {_short(theirs)} in run.json, {_short(ours)} in the model"
        for what, (theirs, ours) in compared.items()
        if theirs != ours
    ]
    if differences:
        raise RunError(
            f"{run} was not sampled from the model at {folder}: {'; '.join(differences)}. "
            f"Train the expert that sampled it ({expert.id}), or sample again with this one"
        )


def check_ranges(run: Run, sample: Sample, vocab_size: int) -> None:
    """Raises RunError naming the trajectory whose ids or steps lie outside the vocabulary or the trajectory."""
    where = f"{run}: trajectory {sample.problem_id!r}, sample {sample.sample_index}"
    every_id = np.concatenate([sample.prompt_token_ids, sample.token_ids, sample.contrast.label_ids])
    if every_id.min() < 0 or every_id.max() >= vocab_size:
        wrong = next(int(token) for token in every_id if not 0 <= token < vocab_size)
        raise RunError(f"{where} holds token {wrong}; the model's head has {vocab_size} columns. Sample the RUN again")
    steps = sample.contrast.steps
    first = 0 if len(sample.prompt_token_ids) else 1  # step 0 is predicted by the prompt's last token
    if steps.min() < first or steps.max() >= len(sample.token_ids):
        raise RunError(
            f"{where} keeps steps {steps.min()} to {steps.max()} of its {len(sample.token_ids)} tokens. "
            "Sample the RUN again"
        )


def example_of(sample: Sample) -> Example:
    """The example of a trajectory with kept steps; step t is predicted at position P + t - 1."""
    contrast, prompt = sample.contrast, sample.prompt_token_ids
    positions = len(prompt) + contrast.steps.astype(np.int64) - 1
    return Example(
        input_ids=np.concatenate([prompt, sample.token_ids])[: positions.max() + 1].astype(np.int64),
        positions=positions,
        label_ids=contrast.label_ids,
        label_weights=contrast.label_weights,
        label_offsets=contrast.label_offsets,
    )


def pack(examples: Sequence[Example]) -> Batch:
    """Lay examples one after another in one sequence.

    transformers keeps them apart, with no attention across, where it is given position_ids that restart, no
    attention_mask and no cache.
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


def _nothing_to_learn(run: Run, trajectories: int) -> str:
    if not trajectories:
        return f"{run} is empty: it holds no trajectory yet; fill it with 'lightreasoner-client sample'"
    beta = run.manifest().beta
    return (
        f"none of the {trajectories} trajectories in {run} has a kept step at beta {beta:g}; "
        "make a RUN with a lower --beta, or with an amateur that differs more"
    )


def _short(digest: str | None) -> str:
    return digest[:DIGITS] if digest else "none"

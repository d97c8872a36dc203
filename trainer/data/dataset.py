"""Reads a RUN for training: trajectories as token ids, with labels at the positions that predict kept steps.

In: a RUN's samples and manifest, and the folder of the model to train. Out: `Example` values. It is an error if the RUN
is empty, is of another model, or has a trajectory that is too long. Never runs a model, never writes.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from client.errors import RunError
from client.models.fingerprints import tokenizer_fingerprint
from client.protocol.requests import Trajectory
from client.runs.keys import Key, Keys
from client.runs.run import Run
from client.runs.samples import Sample
from trainer.adapters.model_folder import ModelFolder
from trainer.data.example import Example

DIGITS = 12
"""Hex digits of a digest in a message."""
NOT_COMPLETE = (
    "is not complete: training on what it holds now. To train on all of it, repeat the command that makes it, then this"
    " one with a new --output; --follow trains while it is sampled"
)
"""What is said of a RUN that is trained on before it is complete, and the remedy."""


@dataclass(frozen=True)
class Limits:
    """The limits of a trajectory: its ids are below `vocab_size`; it fits the model and a micro-batch."""

    vocab_size: int
    context: int | None = None  # the model's; None: no limit
    token_budget: int | None = None


class TrainingSet:
    """The examples of a RUN, part after part, or after `sort` in the order of their keys. Skips repeated keys."""

    def __init__(self, run: Run, limits: Limits) -> None:
        self.run = run
        self.limits = limits
        self.examples: list[Example] = []
        self.ends: list[int] = []  # of each example: kept steps of it and all before it
        self.parts: list[str] = []  # the parts that were read, in the order of reading
        self.without_kept_steps = 0  # trajectories without a kept step, which are left out
        self.sealed = self.sorted = False
        self._keys = Keys()
        self._owners: list[Key] = []  # of each example

    @property
    def kept_steps(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __str__(self) -> str:
        left_out = f"; {self.without_kept_steps:,} without any are left out" if self.without_kept_steps else ""
        return f"{len(self.examples):,} trajectories with {self.kept_steps:,} kept steps{left_out}"

    def add(self, part: str) -> None:
        """Read a part. Raises RunError, naming the damaged part, or the trajectory that cannot be used."""
        for sample in self.run.samples_of(part):
            if not self._keys.add((sample.problem_id, sample.sample_index)):
                continue
            if len(sample.contrast.steps):
                check_ranges(self.run, sample, self.limits.vocab_size)
                example = example_of(sample)
                check_length(self.run, sample, len(example.input_ids), self.limits)
                self.take(example, (sample.problem_id, sample.sample_index))
            else:
                self.without_kept_steps += 1
        self.parts.append(part)

    def take(self, example: Example, key: Key) -> None:
        """Add an example."""
        self.examples.append(example)
        self.ends.append(self.kept_steps + len(example.positions))
        self._owners.append(key)

    def sort(self) -> None:
        """Sort the examples by their keys, so that a seed gives the same training however the RUN was sampled.

        Each sampling brings trajectories, and so parts, in another order.
        """
        self._keep(sorted(range(len(self.examples)), key=self._owners.__getitem__))
        self.sorted = True

    def _keep(self, indices: Sequence[int]) -> None:
        """Keep only these examples, in this order."""
        chosen = [(self.examples[index], self._owners[index]) for index in indices]
        self.examples, self.ends, self._owners = [], [], []
        for example, key in chosen:
            self.take(example, key)

    def all_parts(self) -> list[str]:
        """The parts of the RUN to train on."""
        return self.run.parts("samples")

    def read(self, parts: list[str] | None = None) -> None:
        """Read `parts`. None: read all parts, and raise RunError, with the reason, if there is nothing to learn."""
        self.sealed = self.run.completion() is not None
        for part in self.all_parts() if parts is None else parts:
            self.add(part)
        if parts is None:
            self.check_not_empty()

    def hold_out(self, share: float) -> list[Example]:
        """Remove this share of the examples from the set, and return them with all their steps (`held_out_example`).

        Takes whole problems in the order of a digest of their ids: no problem is on both sides, and a RUN always gives
        the same ones. Never takes more than the share, and so nothing from a RUN with few trajectories.
        """
        many = Counter(problem_id for problem_id, _ in self._owners)
        order = sorted(many, key=_digest_order)
        ends = np.cumsum([many[problem_id] for problem_id in order])
        chosen = set(order[: int(np.searchsorted(ends, math.floor(share * len(self.examples)), side="right"))])
        if not chosen:
            return []
        self._keep([index for index, (problem_id, _) in enumerate(self._owners) if problem_id not in chosen])
        first_step, held_out = self.run.manifest().first_step, dict[Key, Example]()
        for part in self.parts:
            for sample in self.run.samples_of(part):
                key = sample.problem_id, sample.sample_index
                if sample.problem_id in chosen and len(sample.contrast.steps) and key not in held_out:
                    held_out[key] = held_out_example(sample, first_step)
        return [held_out[key] for key in sorted(held_out)]

    def held_out_none(self, share: float) -> str:
        """Why `hold_out` took nothing from the examples, and what to do."""
        many = len(self.examples)
        problems = [problem_id for problem_id, _ in self._owners]
        least = Counter(problems)[min(problems, key=_digest_order)]
        enough = (100 * least // many + 1) / 100
        remedy = f"--held-out {enough:g} holds it out" if enough < 1 else "sample more problems"
        return (
            f"held out none: {share:g} of {many} trajectories is {math.floor(share * many)}, problems are held out "
            f"whole, and the first one has {least}; {remedy}"
        )

    def check_not_empty(self) -> None:
        """Raises RunError, with the reason, if there is nothing to learn."""
        if not self.examples:
            raise RunError(_nothing_to_learn(self.run, self.without_kept_steps))


def check_kept(run: Run) -> None:
    """Raises RunError, with the reason, if a RUN has no kept step. Reads parts only if the RUN is not sealed."""
    completion, trajectories = run.completion(), 0
    if completion:
        if completion.totals.kept:
            return
        trajectories = completion.totals.trajectories
    else:
        for part in run.parts("samples"):
            samples = list(run.samples_of(part))
            if any(len(sample.contrast.steps) for sample in samples):
                return
            trajectories += len(samples)
    raise RunError(_nothing_to_learn(run, trajectories))


def mismatches(run: Run, model: ModelFolder) -> list[str]:
    """How `model` differs from the RUN's expert: weights, tokenizer, chat template; a line for each difference."""
    expert = run.manifest().expert
    compared = {
        "weights": (expert.model_fingerprint, model.fingerprint),
        "tokenizer": (expert.tokenizer_fingerprint, tokenizer_fingerprint(model.path)),
        "chat template": (expert.chat_template_digest, model.template_digest),
    }
    return [
        f"{what} {_short(theirs)} in run.json, {_short(ours)} in the model"
        for what, (theirs, ours) in compared.items()
        if theirs != ours
    ]


def check_expert(run: Run, model: ModelFolder) -> None:
    """Raises RunError, naming every difference, if `model` is not the RUN's expert."""
    if differences := mismatches(run, model):
        raise RunError(
            f"{run} was not sampled from the model at {model}: {'; '.join(differences)}. "
            f"Train the expert that sampled it ({run.manifest().expert.id}), sample again with this one, or give "
            "--allow-mismatch"
            + (
                "; if the server had a --chat-template FILE, give the same"
                if "chat template" in differences[-1]
                else ""
            )
        )


def check_length(run: Run, sample: Sample | Trajectory, length: int, limits: Limits) -> None:
    """Raises RunError, naming the trajectory, if it is too long for a micro-batch, or for the model."""
    where = f"{run}: trajectory {sample.problem_id!r}, sample {sample.sample_index} has {length} tokens"
    if limits.context is not None and length > limits.context:
        raise RunError(f"{where}; the model's context is {limits.context}. Sample the RUN again")
    if limits.token_budget is not None and length > limits.token_budget:
        raise RunError(f"{where}; --token-budget is {limits.token_budget}: give at least {length}")


def check_ranges(run: Run, sample: Sample, vocab_size: int) -> None:
    """Raises RunError, naming the trajectory, if an id is outside the vocabulary, or a step outside the trajectory."""
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
    """The example of a trajectory with kept steps. Step t is predicted at position P + t - 1."""
    contrast, prompt = sample.contrast, sample.prompt_token_ids
    positions = len(prompt) + contrast.steps.astype(np.int64) - 1
    return Example(
        input_ids=np.concatenate([prompt, sample.token_ids])[: positions.max() + 1].astype(np.int64),
        positions=positions,
        label_ids=contrast.label_ids,
        label_weights=contrast.label_weights,
        label_offsets=contrast.label_offsets,
    )


def held_out_example(sample: Sample, first_step: int) -> Example:
    """A whole trajectory: its kept steps, then every other step from `first_step` on with a label of weight 0.

    Leaves out step 0 of a trajectory without a prompt: no position predicts it.
    """
    kept, prompt = sample.contrast, sample.prompt_token_ids
    first = max(first_step, 0 if len(prompt) else 1)
    others = np.setdiff1d(np.arange(first, len(sample.token_ids)), kept.steps)
    return Example(
        input_ids=np.concatenate([prompt, sample.token_ids])[:-1].astype(np.int64),
        positions=len(prompt) - 1 + np.concatenate([kept.steps, others]).astype(np.int64),
        label_ids=np.concatenate([kept.label_ids, np.zeros(len(others), kept.label_ids.dtype)]),
        label_weights=np.concatenate([kept.label_weights, np.zeros(len(others), np.float32)]),
        label_offsets=np.concatenate([kept.label_offsets, kept.label_offsets[-1] + 1 + np.arange(len(others))]),
    )


def _nothing_to_learn(run: Run, trajectories: int) -> str:
    if not trajectories:
        return f"{run} is empty: it holds no trajectory yet; fill it with 'lightreasoner-client sample'"
    beta = run.manifest().beta
    remedy, more = f"'lightreasoner-client build {run} NEW_RUN --beta …'", ""
    if completion := run.completion():
        bounds = completion.totals.kl_quantiles
        if share := next((share for share in ("0.9", "0.99") if 0 < bounds.get(share, 0) < beta), None):
            exceed = f"{1 - float(share):.0%} of the steps exceed {bounds[share]:.2g}"
            remedy = f"'lightreasoner-client build {run} NEW_RUN --beta {bounds[share]:.2g}'; {exceed}"
        if incomplete := completion.totals.incomplete:
            more = f"a larger --top-k ({incomplete:,} plausible sets are incomplete), or with "
    return (
        f"none of the {trajectories:,} trajectories in {run} has a kept step at --beta {beta:g}: give a lower one "
        f"({remedy}), or sample with {more}an amateur that differs more"
    )


def _digest_order(problem_id: str) -> bytes:
    """Sort key: problems are held out in this order."""
    return hashlib.sha256(problem_id.encode()).digest()


def _short(digest: str | None) -> str:
    return digest[:DIGITS] if digest else "none"

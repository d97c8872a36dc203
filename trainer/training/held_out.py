"""Measures held-out trajectories during a training: loss, agreement, and how far the model shifts from its base.

In: held-out examples (`trainer.data.dataset.TrainingSet.hold_out`), transformers' callback events. Out: figures at
regular optimizer steps, in held_out.jsonl and the trainer's state; a copy of the best adapter so far. Draws no random
numbers, so that the weights do not depend on it. Only the first rank measures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from client.errors import ModelError
from trainer.data.example import Example
from trainer.data.packing import Batch, Layout, Sharing, pack, passes
from trainer.settings import Keep, Recipe
from trainer.training.checkpoints import write_whole
from trainer.training.lora import ADAPTER_ALONE, Head, decoder_of, hidden_states
from trainer.training.loss import CHUNK_ELEMENTS, held_out_terms

HELD_OUT = "held_out.jsonl"
MEASUREMENTS = 20
"""Approximate number of measurements in a training, spread evenly. One more precedes it."""
MOST_MEASURED = 128
"""Most held-out trajectories that a measurement takes."""
BEST_WEIGHTS = "best_adapter.safetensors"
"""File in a checkpoint that holds the best adapter so far."""
OTHER_SHIFT = 1.5
"""Weight of `other_shift` in the score. `distance` has weight 1."""
LITTLE = 0.05
"""Largest change of a term of the score, as a share of the score before training, of a model that has hardly moved."""
MEASURED = ("loss", "agreement", "distance", "shift", "other_shift")


@dataclass(frozen=True)
class HeldOutFigures:
    """One measurement. Losses and shifts are in nats, the others shares of 1."""

    step: int  # optimizer steps so far
    loss: float  # D_KL(label || model), mean over the held-out kept steps
    agreement: float  # share of those steps where the model's best token is the label's heaviest
    distance: float  # total variation of label and model, mean over the same steps: probability at wrong tokens
    shift: float  # D_KL(model || base), mean over the same steps
    other_shift: float  # D_KL(model || base), mean over the trajectories' other steps: what is being unlearnt

    @property
    def score(self) -> float:
        """The score that decides which adapter is best; lower is better.

        It adds what is still to be learned to what is unlearnt. Of the sums of these figures that were tried, this one
        follows accuracy best (deploy/demo/README.md, "When to stop"). The loss alone falls even while accuracy falls.
        """
        return self.distance + OTHER_SHIFT * self.other_shift

    def is_close_to(self, first: HeldOutFigures) -> bool:
        """Whether the model has hardly moved since `first`, before training: no term of the score changed by `LITTLE`.

        The sum alone would not tell: what is learned and what is unlearnt can cancel out. The standard error of the
        difference is no measure either: the smallest change exceeds it, since every trajectory changes alike.
        """
        changes = abs(self.distance - first.distance), OTHER_SHIFT * self.other_shift
        return max(changes) < LITTLE * first.distance  # False with NaN

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "score": self.score}


TrajectoryScores = npt.NDArray[np.float64]
"""[T]: the score of each held-out trajectory. A measurement's score is their mean."""


def is_worse(scores: TrajectoryScores, others: TrajectoryScores, errors: float = 1.0) -> bool:
    """Whether the mean of `scores` exceeds that of `others` by more than `errors` standard errors of the difference."""
    difference = scores - others
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return not difference.mean() <= errors * error  # NaN counts as worse


def best_of(history: Sequence[TrajectoryScores]) -> int:
    """The index of the best measurement: the last one, from the lowest score on, before a score that is worse than it.

    The held-out trajectories are few. Among scores that they cannot tell apart, more training has taught more.
    """
    lowest = min(range(len(history)), key=lambda index: history[index].mean())
    later = range(lowest + 1, len(history))
    return next((index for index in later if is_worse(history[index], history[lowest])), len(history)) - 1


class HeldOutWatch(TrainerCallback):
    """Measures every `every` optimizer steps, and with `keep_best` keeps a copy of the best adapter."""

    def __init__(
        self,
        adapted: PeftModel,
        examples: Sequence[Example],
        budget: int,
        every: int,
        file: Path,
        keep_best: bool,
        layout: Layout | None = None,
        console: Console | None = None,
    ) -> None:
        """`console`: gets one line when two measurements in a row are worse than the lowest by two standard errors."""
        self.figures: list[HeldOutFigures] = []
        self._scores: list[TrajectoryScores] = []  # of each measurement
        self._console = console
        self._adapted, self._every, self._file, self._keep_best = adapted, every, file, keep_best
        layout, measured = layout or Layout(), examples[:MOST_MEASURED]
        self._passes = passes(measured, budget, layout)
        self._batches = [pack([measured[at] for at in held], layout.sharing == Sharing.PADDED) for held in self._passes]
        self._base: list[Tensor] = []  # the base's hidden states at the measured steps, batch by batch
        self._best: dict[str, Tensor] | None = None

    @property
    def best(self) -> HeldOutFigures:
        """The measurement with the best adapter, by `best_of`."""
        return self.figures[best_of(self._scores)]

    @property
    def past_the_best(self) -> bool:
        """Whether training went on for too long: the last score is surely worse than the lowest."""
        return self._is_surely_worse(self._scores[-1])

    @property
    def moved_little(self) -> bool:
        """Whether the training was too short, or too gentle, to move the model."""
        return not self.past_the_best and self.figures[-1].is_close_to(self.figures[0])

    def _is_surely_worse(self, scores: TrajectoryScores) -> bool:
        """Whether scores are worse than the lowest by two standard errors. Chance exceeds a single one too often."""
        return is_worse(scores, min(self._scores, key=lambda found: found.mean()), 2.0)

    def outcome(self) -> dict[str, Any]:
        """The entry for lightreasoner.json: three measurements; whether training went too far, or hardly moved."""
        names, measured = ("first", "best", "last"), (self.figures[0], self.best, self.figures[-1])
        figures = {name: found.to_json() for name, found in zip(names, measured, strict=True)}
        judged = {"past_the_best": self.past_the_best, "moved_little": self.moved_little}
        return {**figures, "measured_every": self._every, **judged}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        measured = [logs for logs in state.log_history if "held_out_scores" in logs]
        self.figures = [HeldOutFigures(int(logs["step"]), *(logs[f"held_out_{name}"] for name in MEASURED))
                        for logs in measured]  # fmt: skip
        self._scores = [np.array(logs["held_out_scores"]) for logs in measured]
        if self.figures:
            self._write()
        else:
            self._measure(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._measure(state)

    def write_best(self, checkpoint: Path) -> None:
        """Write the best adapter to a checkpoint. `read_best` reads it when the training is resumed."""
        if self._best is not None:
            save_file(self._best, checkpoint / BEST_WEIGHTS)

    def read_best(self, checkpoint: Path) -> None:
        if (checkpoint / BEST_WEIGHTS).is_file():
            self._best = load_file(checkpoint / BEST_WEIGHTS)

    def restore_best(self) -> None:
        """Load the best adapter into the model."""
        if self._best is not None:
            set_peft_model_state_dict(self._adapted, self._best)

    def _measure(self, state: TrainerState) -> None:
        sums = self._sums()
        kept, others = sums[:, 0].sum(), max(sums[:, 1].sum(), 1.0)
        loss, agreement, distance, shift = (sums[:, 2:6].sum(axis=0) / kept).tolist()
        found = HeldOutFigures(state.global_step, loss, agreement, distance, shift, float(sums[:, 6].sum() / others))
        self.figures.append(found)
        self._scores.append(len(sums) * (sums[:, 4] / kept + OTHER_SHIFT * sums[:, 6] / others))
        if self._keep_best and self.best is found:
            weights = get_peft_model_state_dict(self._adapted, **ADAPTER_ALONE)
            self._best = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in weights.items()}
        self._tell_on_the_way()
        logged = {f"held_out_{name}": getattr(found, name) for name in MEASURED}
        logs: dict[str, Any] = {**logged, "held_out_scores": self._scores[-1].tolist(), "step": found.step}
        state.log_history.append(logs)
        self._write()

    def _write(self) -> None:
        """Write every measurement to held_out.jsonl."""
        best = self.best
        lines = [{**figures.to_json(), "best": figures is best} for figures in self.figures]
        write_whole(self._file, "".join(json.dumps(line) + "\n" for line in lines))

    def _tell_on_the_way(self) -> None:
        """Print, once, that the last two measurements are worse than the lowest."""
        if self._console and len(self.figures) > 2 and all(map(self._is_surely_worse, self._scores[-2:])):
            self._console.print(
                f"step {self.figures[-1].step}: the held-out score has been worse than at step {self.best.step} twice: "
                "training may be past its best",
                style="yellow",
                soft_wrap=True,
            )
            self._console = None

    @torch.no_grad()
    def _sums(self) -> npt.NDArray[np.float64]:
        """The sums of `held_out_terms` over each trajectory's steps: [T, 7], in the order of the trajectories."""
        model: Any = self._adapted.get_base_model()
        decoder, head, device = decoder_of(model), Head(model), model.device
        was_training = self._adapted.training
        self._adapted.eval()
        try:
            if not self._base:
                with self._adapted.disable_adapter():
                    self._base = [self._states(decoder, batch, device) for batch in self._batches]
            sums = []
            for batch, base in zip(self._batches, self._base, strict=True):
                states = self._states(decoder, batch, device)
                rows = max(1, CHUNK_ELEMENTS // head.vocab_size)
                labels = (batch[name].to(device).split(rows) for name in ("label_ids", "label_weights"))  # type: ignore[literal-required]
                terms = []
                for here, there, ids, weights in zip(states.split(rows), base.split(rows), *labels, strict=True):
                    with self._adapted.disable_adapter():
                        base_logits = head(there)
                    terms.append(held_out_terms(head(here), base_logits, ids, weights).cpu())
                owners = trajectories_of(batch)
                of_each = torch.zeros(int(owners.max()) + 1, 7, dtype=torch.float64)
                sums.append(of_each.index_add_(0, owners, torch.cat(terms)))
        finally:
            self._adapted.train(was_training)
        found = torch.cat(sums).numpy()
        return found[np.argsort(np.concatenate(self._passes))]

    @staticmethod
    def _states(decoder: Any, batch: Batch, device: torch.device) -> Tensor:
        states = hidden_states(decoder, batch["input_ids"].to(device), batch["position_ids"].to(device))
        return states.flatten(0, 1)[batch["kept"].to(device)]


def trajectories_of(batch: Batch) -> Tensor:
    """The trajectory of each kept step in a pass, counted from 0: [K], int64."""
    begins = (batch["position_ids"] == 0).flatten().cumsum(dim=0)
    return torch.unique(begins[batch["kept"]], return_inverse=True)[1]


def measured_every(total: int) -> int:
    """Optimizer steps between two measurements of a training of `total`."""
    return math.ceil(total / MEASUREMENTS)


def tell_unmeasured(keep: Keep, console: Console) -> None:
    """Warn that weights sharded by FSDP are not measured. Raises ModelError with `--keep best`."""
    if keep == Keep.BEST:
        raise ModelError("--keep best cannot measure weights that FSDP shards: use DDP, or --keep last")
    console.print("warning: held-out trajectories are not measured with FSDP; give --held-out 0", style="yellow")


def tell_of(watch: HeldOutWatch, recipe: Recipe, console: Console) -> None:
    """Print the figures of the held-out trajectories, with a warning if training was too long or too short."""
    first, best, last = watch.figures[0], watch.best, watch.figures[-1]
    told = [(f"at step {best.step}", best), ("at the last", last)][: 1 + (best.step != last.step)]
    losses = ", ".join(f"{found.loss:.4f} {where}" for where, found in told)
    shifts = ", ".join(f"{found.other_shift:.4f} {where}" for where, found in told)
    console.print(
        f"held-out loss {first.loss:.4f} before training, {losses}; shift from the base at steps that were not selected"
        f" in nats, {shifts}",
        soft_wrap=True,
    )
    if recipe.keep == Keep.BEST:
        nothing = ", and changes nothing: no later step was better" if not best.step else ""
        past = "training went past its best: " if watch.past_the_best else ""
        console.print(f"{past}the adapter of step {best.step} is kept{nothing}", soft_wrap=True)
    elif watch.past_the_best:
        remedy = f"--max-steps {best.step}, or with --keep best" if best.step else "a lower --learning-rate"
        console.print(
            f"warning: training went past its best: the held-out score was best at step {best.step}, and since then "
            f"the model unlearns what it could do (loss.png shows it). Train again with {remedy}",
            style="yellow",
            soft_wrap=True,
        )
    if watch.moved_little:
        longer = "--max-steps" if recipe.max_steps else "--epochs"
        console.print(
            f"warning: the model has hardly moved in {last.step} optimizer steps: the held-out distance from the labels"
            f" was {first.distance:.4f} before training and is {last.distance:.4f} now. Continue with --resume and more"
            f" {longer}, or train again with a higher --learning-rate than {recipe.learning_rate:g}",
            style="yellow",
            soft_wrap=True,
        )

"""Records and shows a training: metrics.jsonl, with a line per optimizer step, and progress on the terminal.

In: transformers' callback events. Out: the file; a progress bar, or without a terminal a line after each tenth of the
training; at the end the loss as a picture, and copies in the RUN for its report. Decides nothing about training.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from client.errors import LightReasonerError, reason_of
from client.runs.run import Run
from client.storage.bucket import BucketError
from trainer.training.held_out import OTHER_SHIFT, HeldOutFigures

METRICS = "metrics.jsonl"
CURVE = "loss.png"
SHOWN_TRAINING = "training.json"
"""File in RUN/training: which training the files beside it are of."""
COLUMNS = (
    "step", "epoch", "loss", "label_entropy", "agreement", "grad_norm", "learning_rate", "kept_steps", "tokens",
    "seconds",
)  # fmt: skip
"""Fields of a line. loss, label_entropy: in nats; agreement: share of the kept steps; seconds: since the last line."""
SCORE = f"score: distance + {OTHER_SHIFT:g} shift at other steps"
SMOOTHED = 20
"""Number of optimizer steps in the running mean of the picture."""


class TrainingError(LightReasonerError):
    """A training failed. The message says what to change."""


@contextlib.contextmanager
def memory_named(where: Callable[[], str], token_budget: int) -> Iterator[None]:
    """A context that turns an out-of-memory error into a TrainingError: it says where, and which options need less."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory {where()}: {reason_of(error)}. Give a lower --token-budget (it was {token_budget}), or"
            " --gradient-checkpointing; continue with --resume if there is a checkpoint"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that a device, or this machine, has no memory for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class Journal(TrainerCallback):
    """Writes metrics.jsonl and shows progress. `losses`: the loss of each optimizer step.

    A resumed training writes the lines up to its checkpoint again, from the checkpoint, and continues.
    """

    def __init__(self, file: Path, console: Console) -> None:
        self.losses: list[float] = []
        self._file = file
        self._console = console
        self._opened = contextlib.ExitStack()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._opened.enter_context(self._file.open("w"))
        for logs in state.log_history:
            if "loss" in logs:
                self._write(logs)
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn()
        terminal = self._console.is_terminal
        self._progress = Progress(TextColumn("training"), *columns, console=self._console, disable=not terminal)
        self._opened.enter_context(self._progress)
        loss = f"loss {self.losses[-1]:.4f}" if self.losses else ""
        self._bar = self._progress.add_task("training", total=state.max_steps, loss=loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # transformers' summary at the end
            return
        step, loss = state.global_step, logs["loss"]
        if not math.isfinite(loss):
            self.close()
            raise TrainingError(f"the loss became {loss} at step {step}: lower --learning-rate, or use --dtype float32")
        self._write({**logs, "step": step})
        self._progress.update(self._bar, completed=step, loss=f"loss {loss:.4f}")
        tenth = step * 10 // state.max_steps > (step - 1) * 10 // state.max_steps
        if tenth and not self._console.is_terminal:
            self._console.print(f"step {step}/{state.max_steps} loss {loss:.4f}")

    def close(self) -> None:
        """Close the progress bar and the file."""
        self._opened.close()

    def _write(self, logs: dict[str, float]) -> None:
        self.losses.append(logs["loss"])
        print(json.dumps({name: logs[name] for name in COLUMNS}), file=self._stream, flush=True)


def draw_curve(losses: Sequence[float], held_out: Sequence[HeldOutFigures], best: int, file: Path) -> None:
    """Draw the loss of each optimizer step, its running mean, the held-out figures and the `best` step, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7 if held_out else 4), layout="constrained")
    above, *below = figure.subplots(2 if held_out else 1, squeeze=False, sharex=True)[:, 0]
    steps = range(1, len(losses) + 1)
    above.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    smooth = [sum(losses[max(0, end - SMOOTHED) : end]) / min(end, SMOOTHED) for end in steps]
    above.plot(steps, smooth, color="tab:blue", label=f"mean of the last {SMOOTHED}")
    above.set(ylabel="contrast loss, nats", ylim=(0, None))
    measured = [found.step for found in held_out]
    if held_out:
        above.plot(measured, [found.loss for found in held_out], color="tab:orange", marker=".", label="held out")
        scores = [found.score for found in held_out]
        above.plot(measured, scores, color="tab:red", linestyle="--", label=SCORE)
        marked = f"best: step {best}, the last within a standard error of the lowest"
        above.axvline(best, color="0.5", linestyle=":", label=marked)
        for axes in below:
            axes.axvline(best, color="0.5", linestyle=":")
            axes.plot(measured, [found.shift for found in held_out], marker=".", label="at kept steps")
            axes.plot(measured, [found.other_shift for found in held_out], marker=".", label="at other steps")
            axes.set(ylabel="shift from the base, nats", ylim=(0, None))
            axes.legend(frameon=False)
    figure.axes[-1].set(xlabel="optimizer step")
    above.legend(frameon=False)
    figure.savefig(file, dpi=120)


def show_in_run(run: Run, files: Mapping[str, Path | None], about: Mapping[str, Any], console: Console) -> None:
    """Copy files to RUN/training, in place of an earlier training's; None removes one. `about`: see `SHOWN_TRAINING`.

    A file that cannot be written is a warning: the adapter is there.
    """
    contents = {name: file.read_bytes() if file else None for name, file in files.items()}
    contents[SHOWN_TRAINING] = json.dumps(about, indent=2).encode() + b"\n"
    for name, mine in contents.items():
        try:
            if name == METRICS and mine and _is_of_another(run.bucket.get(f"training/{name}"), mine):
                console.print(f"{run} shows this training now, and no longer the one before", soft_wrap=True)
            if mine is None:  # an earlier training may have left one there
                run.bucket.remove(f"training/{name}")
            else:
                run.bucket.put(f"training/{name}", mine)
        except BucketError as error:
            console.print(f"warning: {name} is not in the RUN: {error}", style="yellow", soft_wrap=True)


def _is_of_another(metrics: bytes | None, mine: bytes) -> bool:
    """Whether the RUN's metrics are of another training, or of this one before it was repeated."""
    return metrics is not None and not mine.startswith(metrics)

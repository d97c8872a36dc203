"""What a training run says while it goes: metrics.jsonl, a line an optimizer step, and progress on the terminal.

In: transformers' callback events. Out: the file, and a bar, or a plain line every tenth of the way where the
output is no terminal. Decides nothing about training.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from client.errors import LightReasonerError

COLUMNS = ("loss", "learning_rate", "grad_norm")


class TrainingError(LightReasonerError):
    """Training that went wrong on the way: names the step and what to change."""


class Journal(TrainerCallback):
    """Writes metrics.jsonl and shows progress; `losses` keeps each optimizer step's loss."""

    def __init__(self, file: Path, console: Console) -> None:
        self.losses: list[float] = []
        self._file = file
        self._console = console

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._file.open("w")
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeRemainingColumn()
        terminal = self._console.is_terminal
        self._progress = Progress(TextColumn("training"), *columns, console=self._console, disable=not terminal)
        self._progress.start()
        self._bar = self._progress.add_task("training", total=state.max_steps, loss=float("nan"))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:  # transformers' closing summary
            return
        step, loss = state.global_step, logs["loss"]
        if not math.isfinite(loss):
            self._progress.stop()
            raise TrainingError(f"the loss became {loss} at step {step}: lower --learning-rate, or use --dtype float32")
        self.losses.append(loss)
        line = {"step": step, "epoch": logs["epoch"], **{name: logs[name] for name in COLUMNS}}
        print(json.dumps(line), file=self._stream, flush=True)
        self._progress.update(self._bar, completed=step, loss=loss)
        tenth = step * 10 // state.max_steps > (step - 1) * 10 // state.max_steps
        if tenth and not self._console.is_terminal:
            self._console.print(f"step {step}/{state.max_steps} loss {loss:.4f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._progress.stop()
        self._stream.close()

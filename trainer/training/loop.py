"""The training loop: transformers' Trainer with our batches, our loss and our rules for when to stop.

In: an adapted model, optimizer steps of `trainer.data.steps`. Out: the trained model; figures of each step in the logs.
A batch is a whole optimizer step. Its micro-batches are accumulated here, because their number differs between steps.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from client.errors import ModelError
from trainer.adapters.adapter import CONFIG, WEIGHTS
from trainer.data.steps import Step, Steps
from trainer.interruption import Interruption
from trainer.settings import Recipe, Running
from trainer.training.progress import TrainingError

WARMUP_STEPS = 10


class ContrastTrainer(Trainer):
    """The loss is the mean over the kept steps of an optimizer step, over all its micro-batches and ranks.

    Every rank calls `share` with a checkpoint's number when it has written its part. When all have, the first rank
    calls `seal` with that number.
    """

    # A batch is a whole optimizer step, so transformers must not scale the loss by accumulation.
    loss_is_scaled_for_ga = True

    def __init__(
        self, steps: Steps, share: Callable[[int], None], seal: Callable[[int], None], interruption: Interruption,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(train_dataset=steps, **options)
        self.add_callback(_EndWithTheSteps)
        self.add_callback(_EndWhenTold(self))
        self.told_to_stop = False
        """Whether any rank got a signal by the last step. All ranks have the same value."""
        self._interruption = interruption
        self._steps = steps
        self._share, self._seal = share, seal
        self._figures: dict[str, float] = {}
        self._epoch = 0.0
        self._step_began = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader[Step]:
        # Without its own generator the loader draws from torch's global one, and a resumed training would differ.
        return DataLoader(self._steps, batch_size=None, collate_fn=lambda step: step, generator=torch.Generator())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward for one optimizer step; returns its loss, the same on every rank."""
        model.train()
        step: Any = self._prepare_inputs(inputs)
        ranks = self.accelerator.num_processes
        scale = ranks / step["kept_steps"]  # DDP averages gradients over ranks
        totals = torch.zeros(4, device=self.args.device)
        last = len(step["micro_batches"]) - 1
        for index, batch in enumerate(step["micro_batches"]):
            with contextlib.nullcontext() if index == last else self.accelerator.no_sync(model):
                sums = model(**batch)
                self.accelerator.backward(sums.loss * scale)
            totals[:3] += torch.stack(sums).detach()
        totals[3] = float(self._interruption.number > 0)
        *sums_of_all, told = self.accelerator.reduce(totals, "sum")
        self.told_to_stop = bool(told)
        loss, entropy, agreeing = torch.stack(sums_of_all) / step["kept_steps"]
        self._epoch = step["epoch"]
        self._figures = {
            "label_entropy": entropy.item(),
            "agreement": agreeing.item(),
            "kept_steps": step["kept_steps"],
            "tokens": step["tokens"],
        }
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs |= self._figures | {"seconds": now - self._step_began}
            self._step_began = now
            self.state.epoch = self._epoch
        super().log(logs, start_time)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """A linear warm-up over `WARMUP_STEPS` that starts above 0, then a constant learning rate.

        It is constant so that a step does not depend on the number of later steps: a training of N steps is the
        beginning of a longer one. It starts above 0 so that a single step trains, too.
        """
        if self.lr_scheduler is None:
            scheduled = optimizer or self.optimizer
            assert scheduled is not None
            self.lr_scheduler = LambdaLR(scheduled, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate is for padded batches

    def check_finite(self) -> None:
        """Raises TrainingError, on every rank, if a weight is NaN or infinite after the last update."""
        assert self.model is not None
        trained = (weight.detach() for weight in self.model.parameters() if weight.requires_grad)
        local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained)
        odd = torch.zeros((), device=self.args.device)
        for weight in local:
            odd += (~torch.isfinite(weight)).sum()
        if self.accelerator.reduce(odd, "sum"):
            raise TrainingError(
                f"weights became NaN or infinite at step {self.state.global_step}: lower --learning-rate, or use "
                "--dtype float32"
            )

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter in PEFT format. If its weights are sharded, every rank contributes its share."""
        self.check_finite()
        weights = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.is_world_process_zero():
            adapted: Any = self.accelerator.unwrap_model(self.model)
            adapted.save_pretrained(str(folder), state_dict=weights)
            shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes it readable by its owner only

    def save_now(self) -> None:
        """Write a checkpoint between two optimizer steps."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_finite()
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # torch.save, on a full disk
            raise TrainingError(
                f"a checkpoint cannot be written: {error}; make room, and continue with --resume"
            ) from error
        self._share(self.state.global_step)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self._seal(self.state.global_step)
        self.accelerator.wait_for_everyone()


class _EndWithTheSteps(TrainerCallback):
    """Ends the training after the last step of the data, even if transformers' `max_steps` is larger."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_training_stop = True
        return control


class _EndWhenTold(TrainerCallback):
    """Ends all ranks after the same step, with a checkpoint, once one of them got a signal."""

    def __init__(self, trainer: ContrastTrainer) -> None:
        self._trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if self._trainer.told_to_stop:
            control.should_save = control.should_training_stop = True
        return control


def arguments(recipe: Recipe, running: Running) -> TrainingArguments:
    """The settings of transformers for a recipe. The output folder and the number of steps are set later.

    Raises ModelError if a logger is unknown or not installed.
    """
    on_gpu = torch.cuda.is_available()
    loggers = list(running.report_to)
    try:
        for logger in get_reporting_integration_callbacks(loggers):
            logger()  # raises if its package is missing
        args = TrainingArguments(
            output_dir="unused",
            max_steps=1,
            optim="adamw_torch_fused",
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
            gradient_checkpointing=running.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=not on_gpu,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            ignore_data_skip=True,  # `Steps.first` says where to begin
            label_names=["label_ids"],
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=running.save_steps,
            save_total_limit=None,  # `seal` removes old ones; transformers would do so before the new one is whole
            report_to=loggers or "none",
            disable_tqdm=True,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise ModelError(f"transformers rejects these settings: {error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would split the packed sequence
    return args

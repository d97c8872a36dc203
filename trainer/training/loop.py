"""transformers' Trainer, told three things: what a batch is, what the loss is a mean over, and when it is over.

In: an adapted model, optimizer steps of `trainer.data.steps`. Out: the model, trained; figures of each step in the
logs. A batch is a whole optimizer step, whose micro-batches are accumulated here, so that a step holds as many of them
as its trajectories need.
"""

from __future__ import annotations

import contextlib
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
from trainer.data.steps import Step, Steps
from trainer.settings import Recipe, Running
from trainer.training.checkpoints import KEPT
from trainer.training.progress import TrainingError

WARMUP_STEPS = 10


class ContrastTrainer(Trainer):
    """The loss is the mean over the kept steps of an optimizer step, over all its micro-batches and ranks.

    `seal`: called by the first rank with each checkpoint's number, once every rank has written its share.
    """

    # A batch is a whole optimizer step, so there is nothing to scale by accumulation.
    loss_is_scaled_for_ga = True

    def __init__(self, steps: Steps, seal: Callable[[int], None], **options: Any) -> None:
        super().__init__(train_dataset=steps, **options)
        self.add_callback(_EndWithTheSteps)
        self._steps = steps
        self._seal = seal
        self._figures: dict[str, float] = {}
        self._epoch = 0.0
        self._step_began = time.perf_counter()

    def get_train_dataloader(self) -> DataLoader[Step]:
        # Its own generator: a loader takes a number from torch's, which would not come again on resuming.
        return DataLoader(self._steps, batch_size=None, collate_fn=lambda step: step, generator=torch.Generator())

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward for one optimizer step; returns its loss, the same on every rank."""
        model.train()
        step: Any = self._prepare_inputs(inputs)
        ranks = self.accelerator.num_processes
        scale = ranks / step["kept_steps"]  # gradients are averaged over ranks
        totals = torch.zeros(3, device=self.args.device)
        last = len(step["micro_batches"]) - 1
        for index, batch in enumerate(step["micro_batches"]):
            with contextlib.nullcontext() if index == last else self.accelerator.no_sync(model):
                sums = model(**batch)
                self.accelerator.backward(sums.loss * scale)
            totals += torch.stack(sums).detach()
        loss, entropy, agreeing = self.accelerator.reduce(totals, "sum") / step["kept_steps"]
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
        """Constant after a linear warm-up over the first `WARMUP_STEPS`, which starts above 0.

        Constant, so that a step does not depend on how many will follow: a run of N steps is the beginning of a
        longer one. Above 0, so that even a single step trains.
        """
        if self.lr_scheduler is None:
            scheduled = optimizer or self.optimizer
            assert scheduled is not None
            self.lr_scheduler = LambdaLR(scheduled, lambda step: min(1.0, (step + 1) / WARMUP_STEPS))
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers' estimate is for padded batches

    def check_finite(self) -> None:
        """Raises TrainingError, on every rank, where the last update left a weight that is no number."""
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
        """The adapter in PEFT format; where its weights are sharded, every rank brings its own."""
        self.check_finite()
        weights = self.accelerator.get_state_dict(self.model) if self.is_fsdp_enabled else None
        if self.is_world_process_zero():
            adapted: Any = self.accelerator.unwrap_model(self.model)
            adapted.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)

    def save_now(self) -> None:
        """Write a checkpoint between two optimizer steps."""
        self._save_checkpoint(self.model, None)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_finite()
        try:
            super()._save_checkpoint(model, trial)
        except RuntimeError as error:  # of torch.save, on a disk that is full
            raise TrainingError(
                f"a checkpoint cannot be written: {error}; make room, and go on with --resume"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self._seal(self.state.global_step)
        self.accelerator.wait_for_everyone()


class _EndWithTheSteps(TrainerCallback):
    """When there are no more steps training is over, whatever number transformers was told."""

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        control.should_training_stop = True
        return control


def arguments(recipe: Recipe, running: Running) -> TrainingArguments:
    """transformers' settings for a recipe; where to write and how long are told later.

    Raises ModelError where a logger is unknown or not installed.
    """
    on_gpu = torch.cuda.is_available()
    loggers = list(running.report_to)
    try:
        for logger in get_reporting_integration_callbacks(loggers):
            logger()  # says what it lacks
        args = TrainingArguments(
            output_dir="unused",
            max_steps=1,
            learning_rate=recipe.learning_rate,
            seed=recipe.seed,
            gradient_checkpointing=running.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=not on_gpu,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            ignore_data_skip=True,  # the steps are told where to begin
            label_names=["label_ids"],
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=running.save_steps,
            save_total_limit=KEPT,
            report_to=loggers or "none",
            disable_tqdm=True,
        )
    except (ImportError, RuntimeError, ValueError) as error:
        raise ModelError(f"transformers does not take these settings: {error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would cut the packed sequence
    return args

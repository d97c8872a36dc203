"""Fine-tunes the expert on its contrast samples by LoRA: one forward a batch of trajectories, loss at kept steps.

In: a RUN, the model that sampled it, a recipe. Out: a folder with the adapter in PEFT format, lightreasoner.json
and metrics.jsonl. The base model's files are never touched.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainingArguments

from client.errors import ModelError
from client.fingerprints import model_fingerprint, model_folder
from client.run import Run
from trainer.adapter import new_folder, write_provenance
from trainer.base import config_of, load, weights_dtype
from trainer.dataset import Batch, TrainingSet, pack, read_training_set
from trainer.journal import Journal
from trainer.loss import contrast_loss
from trainer.settings import Recipe

RANK, LORA_ALPHA, DROPOUT, TARGETS = 8, 16, 0.05, ("q_proj", "v_proj")
"""The published LoRA."""
WARMUP_STEPS = 10


@dataclass(frozen=True)
class TrainReport:
    """What was done."""

    optimizer_steps: int
    trajectories: int
    without_kept_steps: int
    kept_steps: int
    first_loss: float
    last_loss: float
    seconds: float


class ContrastTrainer(Trainer):
    """transformers' Trainer with the contrast loss, which is the mean over the kept steps of an optimizer step."""

    # A batch is a whole optimizer step, so there is nothing to scale by accumulation.
    loss_is_scaled_for_ga = True

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        return batch_loss(model, inputs)

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


def batch_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The contrast loss of a packed batch; only kept steps go through the LM head."""
    output = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        use_cache=False,  # with a cache transformers would not look for packs
        logits_to_keep=batch["kept"],
    )
    return contrast_loss(output.logits[0], batch["label_ids"], batch["label_weights"])


def train(run_url: str, model: str, output: str, recipe: Recipe, console: Console) -> TrainReport:
    """Train an adapter for `model` on the RUN and write it to `output`.

    Raises RunError where the RUN cannot teach this model, ModelError where `model` or `output` will not do.
    """
    run, base = Run(run_url), model_folder(model)
    training_set = read_training_set(run, base, config_of(base).get_text_config().vocab_size)
    fingerprint, out = model_fingerprint(base), new_folder(output)
    announce(run, training_set, console)
    began = time.monotonic()
    transformers.set_seed(recipe.seed)
    name = str(base.absolute()) if base == Path(model) else model
    adapted = with_lora(load(base, weights_dtype(recipe.dtype, base)), name)
    journal = Journal(out / "metrics.jsonl", console)
    trainer = ContrastTrainer(
        model=adapted,
        args=arguments(out, recipe),
        train_dataset=training_set.examples,  # type: ignore[arg-type]
        data_collator=pack,  # type: ignore[arg-type]
        callbacks=[journal],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    adapted.save_pretrained(str(out), save_embedding_layers=False)
    write_provenance(out, fingerprint, run)
    return TrainReport(
        optimizer_steps=trainer.state.global_step,
        trajectories=len(training_set.examples),
        without_kept_steps=training_set.without_kept_steps,
        kept_steps=training_set.kept_steps,
        first_loss=journal.losses[0],
        last_loss=journal.losses[-1],
        seconds=time.monotonic() - began,
    )


def with_lora(model: PreTrainedModel, name: str) -> PeftModel:
    """The model with a fresh adapter, in float32 whatever the model's type, that remembers its base by `name`.

    Raises ModelError where the model has no such layers.
    """
    config = LoraConfig(
        r=RANK, lora_alpha=LORA_ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS), task_type="CAUSAL_LM"
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"{name} cannot take the adapter: {error}; it needs layers {' and '.join(TARGETS)}") from error
    adapted.peft_config["default"].base_model_name_or_path = name
    return adapted


def arguments(out: Path, recipe: Recipe) -> TrainingArguments:
    """transformers' settings for a recipe."""
    on_gpu = torch.cuda.is_available()
    args = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=recipe.batch_size,
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["label_ids"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    args._n_gpu = min(args.n_gpu, 1)  # DataParallel would cut the packed sequence
    return args


def announce(run: Run, training_set: TrainingSet, console: Console) -> None:
    """Say what is about to be trained on, and what is odd about it."""
    if not training_set.sealed:
        console.print(f"warning: {run} is not sealed; training on what it holds now", style="yellow", soft_wrap=True)
    left_out = training_set.without_kept_steps
    console.print(
        f"{len(training_set.examples)} trajectories with {training_set.kept_steps} kept steps"
        + (f"; {left_out} without any are left out" if left_out else ""),
        soft_wrap=True,
    )

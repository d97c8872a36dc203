"""train: a RUN and its expert in, a LoRA adapter out.

Parses options and prints figures; `trainer.training.train`, which loads torch, does the work.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli.program import Program, importing
from client.errors import LightReasonerError
from client.runs.run import Run
from trainer.cli.inputs import check_answers, check_model, check_training
from trainer.cli.options import (
    ADAPTER,
    MACHINE,
    PROGRESS,
    RECIPE,
    ChatTemplateFile,
    Dtype,
    at_least_one,
    listed,
    positive,
    quiet_transformers,
    wide_console,
)
from trainer.interruption import GO_ON, ended_by_signals
from trainer.settings import ALL_LINEAR, PRESETS, Keep, Lora, Objective, Preset, Recipe, Running, check_together

if TYPE_CHECKING:
    from trainer.adapters.model_folder import ModelFolder

SHARDING, SHARDED = "ACCELERATE_USE_FSDP", ("1", "true", "yes", "on", "y", "t")
"""Environment variable by which accelerate tells its processes that FSDP shards the weights; its values that mean yes.
"""


@dataclass(frozen=True)
class TrainingOptions:
    """The options of `train`: what is learned, and how it is carried out."""

    dtype: Dtype = None
    chat_template: ChatTemplateFile = None
    objective: Annotated[
        Objective,
        typer.Option(
            rich_help_panel=RECIPE,
            help="contrast trains on the contrast samples. sft, the baseline, trains on RUN's correct solutions.",
        ),
    ] = Objective.CONTRAST
    answers: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=RECIPE,
            help="For --objective sft: the problem set that was sampled, with answers.",
        ),
    ] = None
    preset: Annotated[
        Preset,
        typer.Option(
            rich_help_panel=RECIPE,
            help="paper is the published recipe: 1,000 optimizer steps of 16 kept steps, drawn from the whole RUN.",
        ),
    ] = Preset.DEFAULT
    epochs: Annotated[
        float | None,
        typer.Option(rich_help_panel=RECIPE, help="Passes over RUN.", callback=positive, show_default="2"),
    ] = None
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=RECIPE, help="Number of optimizer steps; overrides --epochs."),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=RECIPE,
            help="Trajectories per optimizer step; with --preset paper, kept steps.",
            show_default="16",
        ),
    ] = None
    learning_rate: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=RECIPE,
            callback=positive,
            help="Learning rate of AdamW: reached in 10 steps, then constant.",
            show_default=f"{Recipe.learning_rate:g}",
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            min=0,
            max=2**32 - 1,
            rich_help_panel=RECIPE,
            help="Seed for the adapter's first weights, the order of trajectories and dropout.",
        ),
    ] = Recipe.seed
    held_out: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.9,
            rich_help_panel=RECIPE,
            help="Share of the trajectories to hold out: measured on the way, never trained on. 0 is the default with "
            "--preset paper, --objective sft and --follow, and with FSDP, which cannot measure them.",
            show_default=f"{Recipe.held_out:g}",
        ),
    ] = None
    keep: Annotated[
        Keep,
        typer.Option(
            rich_help_panel=RECIPE, help="The adapter to keep: the last, or the best by the held-out trajectories."
        ),
    ] = Recipe.keep
    rank: Annotated[int, typer.Option(min=1, rich_help_panel=ADAPTER, help="Rank r of LoRA.")] = Lora.rank
    alpha: Annotated[
        int, typer.Option(min=1, rich_help_panel=ADAPTER, help="Alpha of LoRA: the update is scaled by alpha / r.")
    ] = Lora.alpha
    dropout: Annotated[float, typer.Option(min=0, max=0.99, rich_help_panel=ADAPTER, help="Dropout of LoRA.")] = (
        Lora.dropout
    )
    targets: Annotated[
        str,
        typer.Option(
            callback=at_least_one,
            rich_help_panel=ADAPTER,
            help=f"Layers to adapt, separated by commas, or {ALL_LINEAR}.",
        ),
    ] = ",".join(Lora.targets)
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", rich_help_panel=ADAPTER, help="Scale the update by alpha / √r (rsLoRA).")
    ] = False
    use_dora: Annotated[
        bool,
        typer.Option("--use-dora", rich_help_panel=ADAPTER, help="Learn the magnitudes of weights apart (DoRA)."),
    ] = False
    token_budget: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=MACHINE,
            help="Tokens in one forward pass. A longer trajectory is an error.",
            show_default="8192 on a GPU, 512 on a CPU; more for a longer trajectory",
        ),
    ] = Running.token_budget
    no_packing: Annotated[
        bool,
        typer.Option(
            "--no-packing",
            rich_help_panel=MACHINE,
            help="Give each trajectory a padded row, as for models that cannot be packed.",
        ),
    ] = False
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", rich_help_panel=MACHINE, help="Use less memory, at the cost of time."),
    ] = False
    attention: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=MACHINE,
            help="Attention of transformers: sdpa, flash_attention_2, flex_attention, …",
            show_default="on a GPU the best that is exact",
        ),
    ] = None
    report_to: Annotated[
        str,
        typer.Option(
            rich_help_panel=MACHINE,
            help="Loggers of transformers, separated by commas: tensorboard, wandb, …",
        ),
    ] = ""
    save_steps: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=PROGRESS,
            help="Optimizer steps between checkpoints.",
        ),
    ] = Running.save_steps
    keep_checkpoints: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=PROGRESS,
            help="How many checkpoints to keep, the newest; for evaluate --checkpoints.",
        ),
    ] = Running.keep_checkpoints
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", rich_help_panel=PROGRESS, help="Continue from the last complete checkpoint in --output."
        ),
    ] = False
    follow: Annotated[
        bool, typer.Option("--follow", rich_help_panel=PROGRESS, help="Train while RUN is still being sampled.")
    ] = False
    follow_timeout: Annotated[
        float,
        typer.Option(
            callback=positive,
            rich_help_panel=PROGRESS,
            help="With --follow: stop after this many seconds without a new part.",
        ),
    ] = Running.follow_timeout
    allow_mismatch: Annotated[
        bool,
        typer.Option(
            "--allow-mismatch",
            rich_help_panel=PROGRESS,
            help="Train a model that is not RUN's expert. The adapter records the difference.",
        ),
    ] = False

    def recipe(self) -> Recipe:
        """The preset, changed by the options that the user gives."""
        names = "batch_size", "epochs", "max_steps", "learning_rate", "held_out"
        changed = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.epochs is not None:
            changed.setdefault("max_steps", None)
        unmeasured = os.environ.get(SHARDING, "").lower() in SHARDED and self.keep == Keep.LAST
        if self.objective == Objective.SFT or self.follow or unmeasured:
            changed.setdefault("held_out", 0.0)
        lora = Lora(self.rank, self.alpha, self.dropout, listed(self.targets), self.use_rslora, self.use_dora)
        return replace(
            PRESETS[self.preset], **changed, dtype=self.dtype, seed=self.seed, lora=lora, objective=self.objective,
            answers=self.answers, keep=self.keep,
        )  # fmt: skip

    def running(self) -> Running:
        """The options that do not change the recipe."""
        loggers = tuple(name for name in listed(self.report_to) if name != "none")
        return Running(
            self.token_budget, self.gradient_checkpointing, self.attention, self.save_steps, loggers, self.resume,
            self.follow, self.follow_timeout, self.allow_mismatch, packing=not self.no_packing,
            keep_checkpoints=self.keep_checkpoints,
        )  # fmt: skip


def train_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The RUN to train on: a path, file://… or s3://bucket/prefix.")
    ],
    model: Annotated[str, typer.Option(help="The expert that sampled RUN: a folder or a Hugging Face Hub id.")],
    output: Annotated[
        str,
        typer.Option(
            help="Where to write the adapter: a new path or bucket's URL; with --resume, the one that is there."
        ),
    ],
    options: TrainingOptions,
) -> None:
    """Train a LoRA adapter for the expert on the contrast samples of a RUN.

    On several GPUs: torchrun --nproc-per-node N -m trainer train … The GPUs share each batch.
    """
    recipe, running = options.recipe(), options.running()
    with ended_by_signals(lambda: f"stopped: {GO_ON}"):  # optimizer steps end with a checkpoint instead
        check_together(recipe, running)
        base = check_model(model, options.chat_template)
        check_training(Run(run), base, output, recipe, running)
        if recipe.answers:
            check_answers(recipe.answers)
        with importing():
            quiet_transformers()
            from trainer.training.train import train

        report = train(run, base, output, recipe, running, wide_console())
    if report is None:  # a rank that is not the first
        return
    if report.already_done:
        print(f"{output} is complete: {report.optimizer_steps:,} optimizer steps; nothing to do")
        return
    of_step = f" of step {report.adapter_step:,}" if report.adapter_step != report.optimizer_steps else ""
    print(
        f"{report.optimizer_steps:,} optimizer steps over {report.trajectories:,} trajectories "
        f"with {report.kept_steps:,} kept steps in {report.seconds:.1f} s\n"
        f"loss {report.first_loss:.4f} at the first step, {report.last_loss:.4f} at the last\n"
        f"adapter{of_step} in {output}"
    )


def is_trained(words: list[str], base: ModelFolder) -> bool:
    """Whether `train` with these arguments (and --resume) has nothing left to do.

    False if the arguments are invalid, or differ from those that made the adapter: `train` then prints the reason.
    """
    from trainer.training.train import is_complete

    line = Program()
    line.command()(train_command)
    try:
        given = typer.main.get_command(line).make_context("train", [*words]).params  # it empties its list
        options = TrainingOptions(**{field.name: given[field.name] for field in fields(TrainingOptions)})
        return is_complete(given["run"], base, given["output"], options.recipe(), options.running())
    except (typer.TyperException, LightReasonerError):
        return False

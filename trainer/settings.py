"""The trainer's settings and their defaults, for the command line and the code below it.

Imports nothing heavy, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from client.errors import ModelError
from client.protocol.requests import BOX_SYSTEM_PROMPT

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer except the LM head."""


class Precision(StrEnum):
    """The type in which weights are loaded. auto: the type in which the model is stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"


class Unit(StrEnum):
    """What a batch counts: whole trajectories, or kept steps, each with its own prefix."""

    TRAJECTORY = "trajectory"
    STEP = "step"


class Preset(StrEnum):
    """A named recipe: the default, or the published one."""

    DEFAULT = "default"
    PAPER = "paper"


class Objective(StrEnum):
    """What is learned: the labels of kept steps, or whole correct solutions (the SFT baseline)."""

    CONTRAST = "contrast"
    SFT = "sft"


class Keep(StrEnum):
    """Which adapter a training leaves: the last, or the one with the best held-out score."""

    LAST = "last"
    BEST = "best"


@dataclass(frozen=True)
class Lora:
    """The settings of LoRA. The defaults are the published values."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def target_modules(self) -> list[str] | str:
        """The targets as peft takes them: a list of names, or `ALL_LINEAR`."""
        return ALL_LINEAR if self.targets == (ALL_LINEAR,) else list(self.targets)


@dataclass(frozen=True)
class Recipe:
    """What is learned, and how. The same recipe, RUN and number of ranks give the same adapter.

    `train` replaces a `dtype` of None before it starts, so that the adapter records the type in use.
    """

    unit: Unit = Unit.TRAJECTORY
    batch_size: int = 16  # units per optimizer step
    epochs: float = 2.0
    max_steps: int | None = None  # optimizer steps; overrides epochs
    learning_rate: float = 5e-5
    dtype: Precision | None = None  # of the frozen weights; None: bfloat16 on a GPU, float32 on a CPU
    seed: int = 0
    lora: Lora = field(default_factory=Lora)
    objective: Objective = Objective.CONTRAST
    answers: str | None = None  # for SFT: the problem set with the gold answers
    held_out: float = 0.05  # share of the trajectories that is measured and never trained on
    keep: Keep = Keep.LAST


TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}
"""Tokens per micro-batch, by device. On a CPU more are no faster, and the attention mask grows quadratically."""

PRESETS = {
    Preset.DEFAULT: Recipe(),
    # "8 x 2 samples per optimizer step, 1000 steps", a sample being a kept step (LightReasoner, arXiv 2510.07962)
    Preset.PAPER: Recipe(unit=Unit.STEP, batch_size=16, max_steps=1000, held_out=0.0),
}


@dataclass(frozen=True)
class Running:
    """How a recipe is carried out. Most fields change time and memory only, not the result.

    With `follow`, the first epoch takes trajectories in the order in which they arrive.
    """

    token_budget: int | None = None  # tokens per micro-batch; None: TOKEN_BUDGET, or more for a longer trajectory
    gradient_checkpointing: bool = False
    attention: str | None = None  # attn_implementation of transformers; None: its choice, on a GPU the best exact
    save_steps: int = 50  # optimizer steps between checkpoints
    report_to: tuple[str, ...] = ()  # loggers, as transformers names them
    resume: bool = False
    follow: bool = False
    follow_timeout: float = 1800.0  # seconds without a new part, after which `follow` gives up
    allow_mismatch: bool = False
    packing: bool = True  # several trajectories in one sequence, where that changes nothing
    keep_checkpoints: int = 2  # the newest, and the one before in case the newest is incomplete


def check_together(recipe: Recipe, running: Running) -> None:
    """Raises ModelError if two settings exclude each other."""
    if running.follow and recipe.unit == Unit.STEP:
        raise ModelError("--follow takes trajectories as they come; --preset paper draws from the whole RUN: give one")
    if (recipe.objective == Objective.SFT) != (recipe.answers is not None):
        raise ModelError("--objective sft and --answers FILE belong together: sft trains on the correct solutions")
    if recipe.objective == Objective.SFT and recipe.unit == Unit.STEP:
        raise ModelError("--preset paper is the contrast's recipe; --objective sft takes whole solutions: give one")
    if recipe.held_out and (running.follow or recipe.objective == Objective.SFT):
        raise ModelError("--held-out needs a whole RUN of contrast samples: leave out --follow or --objective sft")
    if recipe.keep == Keep.BEST and not recipe.held_out:
        raise ModelError("--keep best needs --held-out above 0: the best is that of the held-out trajectories")


OUTPUTS = "outputs.jsonl"
"""File in a table's folder that holds every output of the table's models."""


@dataclass(frozen=True)
class Examination:
    """How a model is evaluated: the prompt, and how outputs are decoded."""

    max_tokens: int = 1024
    system_prompt: str = BOX_SYSTEM_PROMPT  # "": no message
    limit: int | None = None  # problems per benchmark
    n: int = 1  # outputs per problem
    temperature: float = 0.0  # greedy
    top_p: float = 1.0
    seed: int = 0
    dtype: Precision | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    date: str | None = None  # the day that the chat template writes; None: it writes no date
    question_field: str | None = None  # these three: for rows of no known benchmark
    choices_field: str | None = None
    answer_field: str | None = None

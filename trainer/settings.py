"""What can be chosen, with the defaults: the one place that both the command line and the work read.

Imports nothing heavy, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

ALL_LINEAR = "all-linear"
"""What peft calls every linear layer but the LM head."""


class Precision(StrEnum):
    """The type in which weights are loaded; auto is the one in which the model is stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"


class Unit(StrEnum):
    """What a batch is counted in: whole trajectories, or kept steps, each with its own prefix."""

    TRAJECTORY = "trajectory"
    STEP = "step"


class Preset(StrEnum):
    """A recipe by name: ours, or the published one."""

    DEFAULT = "default"
    PAPER = "paper"


class Objective(StrEnum):
    """What is learned: the contrast's labels at kept steps, or right solutions, whole (the SFT baseline)."""

    CONTRAST = "contrast"
    SFT = "sft"


@dataclass(frozen=True)
class Lora:
    """The adapter's settings, as peft names them; the defaults are the published ones."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def target_modules(self) -> list[str] | str:
        """As peft wants them: names, or its one word for every linear layer but the head."""
        return ALL_LINEAR if self.targets == (ALL_LINEAR,) else list(self.targets)


@dataclass(frozen=True)
class Recipe:
    """What is learned, and how: two trainings of one recipe on one RUN, on as many ranks, end with the same adapter.

    `train` resolves a `dtype` of None before all else, so that what it records says which it was.
    """

    unit: Unit = Unit.TRAJECTORY
    batch_size: int = 16  # units an optimizer step
    epochs: float = 2.0
    max_steps: int | None = None  # optimizer steps; overrides epochs
    learning_rate: float = 5e-5
    dtype: Precision | None = None  # of the frozen weights; None: bfloat16 on a GPU, float32 on a CPU
    seed: int = 0
    lora: Lora = field(default_factory=Lora)
    objective: Objective = Objective.CONTRAST
    answers: str | None = None  # of SFT: the problem set with the gold answers


TOKEN_BUDGET = {"cpu": 512, "cuda": 8192}
"""Tokens a micro-batch. A CPU gains nothing from longer sequences, whose attention mask costs their square."""

PRESETS = {
    Preset.DEFAULT: Recipe(),
    # "8 x 2 samples per optimizer step, 1000 steps", a sample being a kept step (LightReasoner, arXiv 2510.07962)
    Preset.PAPER: Recipe(unit=Unit.STEP, batch_size=16, max_steps=1000),
}


@dataclass(frozen=True)
class Running:
    """How a recipe is carried out: time, memory and patience, which leave the result as it is, and what may be read.

    `follow` takes the first epoch's trajectories as they arrive, and not in a drawn order.
    """

    token_budget: int | None = None  # tokens a micro-batch; None: TOKEN_BUDGET, and more for a longer trajectory
    gradient_checkpointing: bool = False
    attention: str | None = None  # transformers' attn_implementation; None: its own choice
    save_steps: int = 50  # optimizer steps between checkpoints
    report_to: tuple[str, ...] = ()  # loggers, as transformers names them
    resume: bool = False
    follow: bool = False
    follow_timeout: float = 1800.0  # seconds without a new part
    allow_mismatch: bool = False


@dataclass(frozen=True)
class Examination:
    """How questions are put to a model that is evaluated."""

    max_tokens: int = 1024
    system_prompt: str = r"Please reason step by step, and put your final answer within \boxed{}."  # "": no message
    limit: int | None = None  # problems a benchmark
    n: int = 1  # outputs a problem
    temperature: float = 0.0  # greedy
    top_p: float = 1.0
    seed: int = 0
    dtype: Precision | None = None

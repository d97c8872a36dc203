"""What can be chosen, with the defaults: the one place that both the command line and the work read.

Imports nothing heavy, so that --help is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """The type in which weights are loaded; auto is the one in which the model is stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """How to train. LoRA's own settings are the published ones, in `trainer.train`."""

    epochs: float = 2.0
    max_steps: int | None = None  # optimizer steps; overrides epochs
    learning_rate: float = 5e-5
    batch_size: int = 16  # trajectories an optimizer step
    dtype: Precision | None = None  # of the frozen weights; None: bfloat16 on a GPU, float32 on a CPU
    seed: int = 0


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

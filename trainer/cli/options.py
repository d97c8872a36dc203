"""Options that several of the trainer's commands share, the checks of their values, and the console.

In: what a user typed. Out: checked values, a console. Imports nothing heavy.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from client.cli.options import TEMPLATE_VARIABLES
from trainer.settings import Precision

RECIPE, ADAPTER, MACHINE = "Recipe", "Adapter", "Machine"
BENCHMARKS, DECODING, RESULTS = "Benchmarks", "Decoding", "Results"
PROGRESS = "Checkpoints and the RUN"
"""Groups of options in --help."""
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
"""Environment variables that `quiet_vllm` sets."""


def positive(value: float | None) -> float | None:
    """A finite number above 0; None if the option is not given."""
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value} is not a number above 0")
    return value


def listed(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def at_least_one(text: str) -> str:
    """A comma-separated list with at least one name."""
    if not listed(text):
        raise typer.BadParameter(f"{text!r} is empty")
    return text


def share(value: float) -> float:
    """A number above 0 and at most 1."""
    if not 0 < value <= 1:
        raise typer.BadParameter(f"{value} must be above 0 and at most 1")
    return value


def named_files(values: list[str]) -> list[str]:
    """Check the values of --benchmark: NAME=FILE, each name once."""
    names = [value.partition("=")[0] for value in values]
    for value in values:
        name, equals, file = value.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"{value!r} is not NAME=FILE")
        if names.count(name) > 1:
            raise typer.BadParameter(f"the name {name!r} is given twice")
    return values


def files_by_name(values: list[str]) -> dict[str, str]:
    """The values of --benchmark by name. `named_files` has checked them."""
    return dict(value.split("=", 1) for value in values)


Dtype = Annotated[
    Precision | None,
    typer.Option(
        help="Type of the model's weights in memory; auto keeps the stored type.",
        show_default="bfloat16 on a GPU, float32 on a CPU",
    ),
]
Benchmarks = Annotated[
    list[str],
    typer.Option(
        "--benchmark",
        metavar="NAME=FILE",
        callback=named_files,
        rich_help_panel=BENCHMARKS,
        help="A problem set with answers, and the name it gets in the results. Repeat it for several benchmarks.",
    ),
]
ProblemLimit = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=BENCHMARKS, help="Only the first N problems of each benchmark."),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-tokens", min=1, rich_help_panel=DECODING, help="Maximum length of an output, in tokens.")
]
ChatTemplateFile = Annotated[
    Path | None,
    typer.Option(
        "--chat-template", metavar="FILE", help="Jinja file that takes the place of the model's chat template."
    ),
]
TemplateVariables = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", metavar="JSON", rich_help_panel=DECODING, help=TEMPLATE_VARIABLES),
]
SystemPrompt = Annotated[str, typer.Option(rich_help_panel=DECODING, help='System prompt; "" for none.')]


def wide_console() -> Console:
    """Standard output. If it is not a terminal, it is wide enough for a table."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def quiet_vllm() -> None:
    """Turn off warnings of vLLM and torch, for example of Triton and NUMA on a CPU, unless the user set the variables.

    Call it before either is imported: torch reads its variable then, and vLLM warns before it reads its own.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def quiet_transformers() -> None:
    """Turn off progress bars and advice of transformers: the commands print what matters."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

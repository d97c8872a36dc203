"""What the trainer's commands share: how options are checked, how output looks. Imports nothing heavy."""

from __future__ import annotations

import sys

import typer
from rich.console import Console


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


def wide_console() -> Console:
    """Standard output, wide enough for the table where it is no terminal."""
    return Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)


def quiet_transformers() -> None:
    """No progress bars or advice from transformers: commands say what there is to say."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

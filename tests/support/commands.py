"""The packages' command lines as click commands, for tests of their help texts."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

import typer


@cache
def program(package: str) -> Any:
    """The command line of a package."""
    made = import_module(f"{package}.__main__")
    return typer.main.get_command(getattr(made, "program", None) or made.app)

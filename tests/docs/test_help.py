"""`--help` of every command prints what stands in `help/`, so that no text changes unseen.

    RENEW_HELP=1 .venv/bin/python -m pytest tests/docs/test_help.py

writes the files anew. Read the difference, and commit it with the change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from support.commands import program
from support.house import PACKAGES
from support.servers.real_server import ROOT
from typer import rich_utils
from typer.testing import CliRunner

TEXTS = Path(__file__).parent / "help"
WIDTH = 100
HOW_TO_RENEW = (
    f"\n\nif this is meant: RENEW_HELP=1 .venv/bin/python -m pytest {Path(__file__).relative_to(ROOT)}, "
    "and commit what it writes"
)


def commands(line: Any, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """A program and each command below it, word by word."""
    yield words
    for name, command in getattr(line, "commands", {}).items():
        yield from commands(command, (*words, name))


COMMANDS = [words for package in PACKAGES for words in commands(program(package), (f"lightreasoner-{package}",))]


def file_of(words: tuple[str, ...]) -> Path:
    return TEXTS / f"{'-'.join(words).removeprefix('lightreasoner-')}.txt"


def help_of(words: tuple[str, ...], patch: pytest.MonkeyPatch) -> str:
    """What a command prints, without colours, as wide as `WIDTH` on every terminal."""
    patch.setattr(rich_utils, "MAX_WIDTH", WIDTH)
    patch.setattr(rich_utils, "FORCE_TERMINAL", False)
    app: typer.Typer = import_module(f"{words[0].removeprefix('lightreasoner-')}.__main__").program
    said = CliRunner().invoke(app, [*words[1:], "--help"], prog_name=words[0])
    assert said.exit_code == 0, said.output
    return "\n".join(map(str.rstrip, said.output.strip("\n").splitlines())) + "\n"


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_help_of_a_command_is_the_one_that_was_agreed(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    said, file = help_of(words, monkeypatch), file_of(words)
    if "RENEW_HELP" in os.environ:
        TEXTS.mkdir(exist_ok=True)
        file.write_text(said)
    agreed = file.read_text() if file.exists() else ""
    assert said.splitlines() == agreed.splitlines(), HOW_TO_RENEW


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_prints_the_version(words: tuple[str, ...]) -> None:
    app: typer.Typer = import_module(f"{words[0].removeprefix('lightreasoner-')}.__main__").program
    said = CliRunner().invoke(app, [*words[1:], "--version"], prog_name=words[0])
    assert (said.exit_code, said.output) == (0, f"lightreasoner {version('lightreasoner')}\n")


def test_every_agreed_text_is_of_a_command() -> None:
    if "RENEW_HELP" in os.environ:
        for file in set(TEXTS.iterdir()) - set(map(file_of, COMMANDS)):
            file.unlink()
    assert sorted(TEXTS.iterdir()) == sorted(map(file_of, COMMANDS)), HOW_TO_RENEW

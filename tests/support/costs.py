"""The cost of a test, found from what it uses: `unit`, `process` or `engine`.

In: a collected test. Reads the test's function, its fixtures, and the functions in tests/ that they call. A test that
reaches `running_server` or `AnswerEngine` starts vLLM; a test that reaches `subprocess` starts a process. If only the
product starts an engine, as `evaluate` does, the test is marked by hand.
"""

from __future__ import annotations

import subprocess
import types
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ENGINE, PROCESS, UNIT = "engine", "process", "unit"
STARTS_ENGINES = frozenset({"running_server", "AnswerEngine"})


def cost(item: pytest.Item) -> str:
    """The highest cost of what a test uses. A mark on the test overrides it."""
    for marked in (ENGINE, PROCESS):
        if item.get_closest_marker(marked):
            return marked
    return dearest(functions_of(item))


def shares_engines(item: pytest.Item) -> bool:
    """Whether a test uses engines that serve the whole session."""
    fixtures = (made for definitions in item._fixtureinfo.name2fixturedefs.values() for made in definitions)
    return dearest(made.func for made in fixtures if made.scope == "session") == ENGINE


def functions_of(item: pytest.Item) -> Iterator[object]:
    """The functions of a test and of all its fixtures, including fixtures of fixtures."""
    if isinstance(item, pytest.Function):
        yield item.function
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        yield from (made.func for made in definitions)


def dearest(functions: Iterable[object]) -> str:
    """The highest cost of these functions."""
    found = {name for function in functions for name in uses(function)}
    if found & STARTS_ENGINES:
        return ENGINE
    return PROCESS if "subprocess" in found else UNIT


@cache
def uses(function: object) -> frozenset[str]:
    """The names that a function in tests/ uses, by itself or through the functions that it calls."""
    return frozenset(_names(function, set()))


def _names(function: object, seen: set[int]) -> Iterator[str]:
    if isinstance(function, type):
        for member in vars(function).values():
            yield from _names(member, seen)
        return
    function = getattr(function, "fget", getattr(function, "__wrapped__", function))
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    if not Path(function.__code__.co_filename).is_relative_to(TESTS):
        return
    for name in _names_in(function.__code__):
        yield name
        value = function.__globals__.get(name)
        if value is subprocess:
            yield "subprocess"
        elif isinstance(value, types.FunctionType | type) or hasattr(value, "__wrapped__"):
            yield from _names(value, seen)


def _names_in(code: types.CodeType) -> Iterator[str]:
    """The names in a piece of code, and in the functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)

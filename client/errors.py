"""Errors that a user can cause and fix. The command lines print them without a traceback."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

MOST_SHOWN = 100
"""Most characters of a value in a message: a value may be a megabyte."""
LIKENESS = 0.7
"""Least similarity (1: equal) at which an unknown name counts as a misspelled known one."""
EXPECTED_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "a string", "list": "a list",
    "dict": "an object", "model": "an object", "model_attributes": "an object", "dataclass": "an object",
    "tuple": "a list", "path": "a path", "date": "a date, as 2026-01-31", "bytes": "a string",
}  # fmt: skip
"""What pydantic expected, in words, by the first word of its error type."""
EXPECTED_BOUNDS = {
    "greater_than": "more than {gt}", "greater_than_equal": "at least {ge}", "less_than": "less than {lt}",
    "less_than_equal": "at most {le}", "literal_error": "{expected}", "enum": "{expected}",
    "finite_number": "a finite number", "int_from_float": "a whole number",
    "int_parsing_size": "a number of fewer digits", "multiple_of": "a multiple of {multiple_of}",
    "string_pattern_mismatch": "a string like {pattern}",
    "string_too_short": "at least {min_length} characters", "string_too_long": "at most {max_length} characters",
    "too_short": "a list of at least {min_length}", "too_long": "a list of at most {max_length}",
    "string_unicode": "a string in UTF-8", "none_required": "nothing",
}  # fmt: skip


class LightReasonerError(Exception):
    """Base of every error whose message names the thing, what was expected and what to do."""

    may_pass: bool = False
    """Whether the same command may succeed later, or on another machine, with nothing corrected."""


def missing_extra(error: ModuleNotFoundError, extra: str) -> str:
    """The message for a command whose packages are not installed."""
    return f"{error.name} is not installed: {how_to_install(extra)}"


def how_to_install(extra: str) -> str:
    """The command that installs an extra, from an index or from a checkout."""
    return f"pip install 'lightreasoner[{extra}]' (in a checkout: pip install '.[{extra}]')"


def one_line(text: str) -> str:
    """Make a text from elsewhere safe for a terminal: one line, with escapes for unprintable characters.

    Unescaped, it could move the cursor, hide text, or look like a line of ours.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else " " if char in "\r\n\t" else repr(char)[1:-1] for char in text)


def clean_lines(text: str) -> str:
    """Apply `one_line` to each line of a text of ours, which may quote others."""
    return "\n".join(map(one_line, text.split("\n")))


def shorten(text: str, most: int = MOST_SHOWN) -> str:
    """Cut a text from elsewhere after `most` characters, and apply `one_line`."""
    return one_line(text) if len(text) <= most else f"{one_line(text[:most])}…"


def shown(value: object) -> str:
    """A value as text for a message; a long or deep one is cut."""
    return shorten(reprlib.repr(value))


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?"; '' if no known name is like it."""
    near = get_close_matches(name, list(known), 1, LIKENESS)
    return f"; did you mean {shown(prefix + near[0])}?" if near else ""


def fault_words(entry: Mapping[str, Any]) -> str:
    """What is wrong with a value, in our own words. `entry`: one of pydantic's `errors()`."""
    kind, context = str(entry["type"]), entry.get("ctx") or {}
    if kind in ("value_error", "assertion_error"):
        return " ".join(entry["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").split())
    if kind in ("missing", "extra_forbidden"):
        return "it is missing" if kind == "missing" else "no such field"
    if kind == "json_invalid":
        return f"not JSON: {context.get('error', '')}"
    expected = EXPECTED_BOUNDS.get(kind)
    if expected is None and kind.endswith(("_type", "_parsing")):
        expected = EXPECTED_KINDS.get(kind.removesuffix("_type").removesuffix("_parsing"))
    return f"expected {expected.format_map(context)}" if expected else " ".join(entry["msg"].split())


def reason_of(error: BaseException) -> str:
    """The whole message of a library's exception, on one line; its repr if the message is empty.

    A ValidationError of pydantic, which spans lines and repeats the input, becomes each field, its value and the fault.
    """
    if not isinstance(error, ValidationError):
        return one_line(" ".join(str(error).split())) or repr(error)
    said = []
    for entry in error.errors():
        field = f"{shorten(str(entry['loc'][0]))} {shown(entry['input'])}: " if entry["loc"] else ""
        said.append(f"{field}{fault_words(entry)}")
    return "; ".join(dict.fromkeys(said))


class ProblemSetError(LightReasonerError):
    """A problem set cannot be read. The message names file and line."""


class RunError(LightReasonerError):
    """A RUN is missing, empty, damaged or made with other settings."""


class LostTrajectories(RunError):
    """A RUN lacks trajectories that it held before."""

    may_pass = True


class TooManyFailures(LightReasonerError):
    """More trajectories failed than --max-failures allows. The RUN keeps the finished ones."""


class ServiceError(LightReasonerError):
    """A server cannot be reached, is not ready, or rejected a request."""


class Unreachable(ServiceError):
    """A server did not answer, but may answer a retry. `retry_after`: the pause that it asked for, in seconds."""

    may_pass = True

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TlsError(Unreachable):
    """A certificate is invalid, or one side speaks TLS and the other does not.

    Waiting does not help, except for a server that answered before: its certificate may be renewed.
    """

    may_pass = False


class Busy(Unreachable):
    """A server is overloaded: it works, but accepts no more now."""


class Stopped(LightReasonerError):
    """Work was stopped before its end. The message says what is kept and how to resume."""


class ModelError(LightReasonerError):
    """A model folder lacks a file or a setting, or two models do not fit together."""

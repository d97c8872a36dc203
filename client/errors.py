"""The family of errors that a user can cause and mend; command lines print them without a traceback."""

from __future__ import annotations

import reprlib

MOST_SHOWN = 100
"""Characters of a value in a message; it may be a megabyte."""


class LightReasonerError(Exception):
    """Base of every error whose message names the thing, what was expected and what to do."""


def missing_extra(error: ModuleNotFoundError, extra: str) -> str:
    """What to say when a command's own packages are not installed."""
    return f"{error.name} is not installed: {how_to_install(extra)}"


def how_to_install(extra: str) -> str:
    """The command that installs an extra, from an index or from a checkout."""
    return f"pip install 'lightreasoner[{extra}]' (in a checkout: pip install '.[{extra}]')"


def shorten(text: str, most: int = MOST_SHOWN) -> str:
    """The beginning of a text, as much as a message has room for."""
    return text if len(text) <= most else f"{text[:most]}…"


def shown(value: object) -> str:
    """A value of any size and depth as a message shows it; small ones whole."""
    return shorten(reprlib.repr(value))


class ProblemSetError(LightReasonerError):
    """A problem set that cannot be read: names file and line."""


class RunError(LightReasonerError):
    """A RUN that is missing, empty, damaged or made with other settings."""


class TooManyFailures(LightReasonerError):
    """More trajectories failed than the user bears; what was answered is kept."""


class ServiceError(LightReasonerError):
    """A server that cannot be reached, is not ready, or refused a request."""


class Unreachable(ServiceError):
    """A server that gave no answer, or none for now: asked again, it may. `retry_after`: seconds it asked for."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Busy(Unreachable):
    """A server that works, and has no room for more now."""


class Stopped(LightReasonerError):
    """Work that was asked to stop before its end: names what is kept and how to go on."""


class ModelError(LightReasonerError):
    """A model folder that lacks what is needed of it, or two models that cannot work together."""

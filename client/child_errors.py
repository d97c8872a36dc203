"""Tells a process why its child process of vLLM failed; vLLM itself says only that it failed.

In: exceptions that the children's `vllm` logger logs as errors. Out: the message of the last one, through a small file
that an environment variable names. The package's vLLM plugin calls `tell_parent` in each process of an engine. Does not
import vLLM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import parent_process
from pathlib import Path

from client.environment import environment
from client.errors import reason_of

VARIABLE = "LIGHTREASONER_CHILD_ERRORS"
"""Environment variable that names the file to the children."""
SAYS_NOTHING = ("initialization failed", "See root cause", "see stack trace")
"""Words of messages that only report that another process failed."""
LOOKED_AT = "Error raised in subprocess:"
"""vLLM inspects a model's class in a separate process. If that fails, it logs this and the traceback of that
process."""


@contextlib.contextmanager
def collected() -> Iterator[Callable[[], str | None]]:
    """Collect the errors of processes that start in this context.

    Yields a function that returns the last cause, or None.
    """
    with tempfile.TemporaryDirectory(prefix="lightreasoner-") as folder:
        file = Path(folder) / "errors"
        own = _ToFile(file)
        own.addFilter(_is_of_a_look)
        logging.getLogger("vllm").addHandler(own)
        try:
            with environment({VARIABLE: str(file)}):
                yield lambda: _cause(file)
        finally:
            logging.getLogger("vllm").removeHandler(own)


def tell_parent() -> None:
    """In a child of a process that uses `collected`: append logged errors to its file. Elsewhere: do nothing."""
    if VARIABLE in os.environ and parent_process() is not None:
        logging.getLogger("vllm").addHandler(_ToFile(Path(os.environ[VARIABLE])))


class _ToFile(logging.Handler):
    """Appends the message of every exception that is logged as an error, one line each."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.ERROR)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return
        reason = str(error).strip().splitlines()[-1] if _is_of_a_look(record) else reason_of(error)
        with contextlib.suppress(OSError), self._file.open("a", encoding="utf-8") as file:
            file.write(reason + "\n")


def _is_of_a_look(record: logging.LogRecord) -> bool:
    """Whether the record says that vLLM could not inspect a model's class."""
    return bool(record.exc_info and str(record.exc_info[1]).startswith(LOOKED_AT))


def _cause(file: Path) -> str | None:
    if not file.is_file():
        return None
    told = file.read_text(encoding="utf-8").splitlines()
    causes = [line for line in told if not any(words in line for words in SAYS_NOTHING)]
    return causes[-1] if causes else None

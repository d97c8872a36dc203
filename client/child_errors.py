"""Why a child process of vLLM failed, told to the process that started it: vLLM itself says only that it failed.

In: errors that a child's `vllm` logger is given. Out: the last one's message, by way of a small file that both know.
The package's vLLM plugin calls `tell_parent` in each process of an engine. Imports no vLLM.
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
"""Names the file, in the environment of the children."""
SAYS_NOTHING = ("initialization failed", "See root cause", "see stack trace")
"""In messages that only pass on that another process failed."""
LOOKED_AT = "Error raised in subprocess:"
"""vLLM looks at a model's class in a process of its own. If that fails, it logs this and the process's traceback."""


@contextlib.contextmanager
def collected() -> Iterator[Callable[[], str | None]]:
    """Processes that start meanwhile tell of their errors; yields what gives the last cause, or None."""
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
    """In a child of a process that collects, and nowhere else: write down what is logged as an error."""
    if VARIABLE in os.environ and parent_process() is not None:
        logging.getLogger("vllm").addHandler(_ToFile(Path(os.environ[VARIABLE])))


class _ToFile(logging.Handler):
    """Appends the message of every exception that is logged as an error, a line each."""

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
    """Whether vLLM logs here that it could not look at a model's class."""
    return bool(record.exc_info and str(record.exc_info[1]).startswith(LOOKED_AT))


def _cause(file: Path) -> str | None:
    if not file.is_file():
        return None
    told = file.read_text(encoding="utf-8").splitlines()
    causes = [line for line in told if not any(words in line for words in SAYS_NOTHING)]
    return causes[-1] if causes else None

"""Environment variables for a while, and the one of vLLM's sockets. In: values. Out: all as before, afterwards."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping

from client.errors import LightReasonerError

SOCKETS = "VLLM_RPC_BASE_PATH"
LONGEST_SOCKETS_FOLDER = 107 - 37
"""Bytes: a socket's path has 107 at most, and vLLM's names have 36."""


def sockets_in(folder: str) -> dict[str, str]:
    """The variable that has vLLM make its sockets in a folder of the caller's, since it leaves them behind.

    None where the user names another folder, or the path would be too long.
    """
    fits = len(os.fsencode(folder)) <= LONGEST_SOCKETS_FOLDER
    return {SOCKETS: folder} if fits and SOCKETS not in os.environ else {}


def check_temporary_folder() -> None:
    """Raises LightReasonerError if this process has no folder for temporary files, as in a read-only container."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise LightReasonerError(f"{error.strerror}; set TMPDIR to a folder that this user may write") from None


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """This process and those that it starts meanwhile have these environment variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

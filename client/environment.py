"""Sets environment variables within a context, among them the one for vLLM's sockets.

In: values. Out: nothing; the earlier values are restored at the end.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping

from client.errors import LightReasonerError

SOCKETS = "VLLM_RPC_BASE_PATH"
LONGEST_SOCKETS_FOLDER = 107 - 37
"""Most bytes of the folder's path: a socket's path has at most 107, of which a slash and vLLM's name take 37."""


def sockets_in(folder: str) -> dict[str, str]:
    """The environment variable that makes vLLM create its sockets in `folder`: vLLM does not remove them itself.

    Empty if the user has set the variable, or if the path would be too long.
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
    """Set these environment variables for this process, and for those that it starts within the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

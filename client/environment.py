"""Environment variables for a while. In: names and values. Out: the same variables as before, afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

SOCKETS = "VLLM_RPC_BASE_PATH"
"""Names the folder of vLLM's sockets, which it leaves behind: each engine has one of its own, which ends with it."""


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

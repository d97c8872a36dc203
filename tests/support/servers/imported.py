"""The server's command in a process that has imported all of it, its engines' part too: a start takes a third.

It stands in for the public command where a test is about what a server answers. Only three things differ: nothing is
imported; vLLM looks at a kind of model that it has not seen on this machine in this process, not in one that imports
vLLM for it; and the engines' processes are forks of this process' own fork, not of an interpreter that was started for
them. So they do not carry the server's mark, and the watchdog would not find them: what is claimed of starting, ending
and being killed is tried on the public command.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any

from vllm.model_executor.models import registry

from server.__main__ import main as program

ENGINES = "from multiprocessing.forkserver import main"
"""How the command of the engines' fork server begins."""
_started = util.spawnv_passfds


def main() -> None:
    util.spawnv_passfds = fork_or_start
    registry._run_in_subprocess = look_here
    program()


def look_here(look: Callable[[], Any]) -> Any:
    """In place of vLLM's, which fears that the look initializes a GPU."""
    try:
        return look()
    except Exception as error:
        raise RuntimeError(f"Error raised in subprocess:\n{traceback.format_exc()}") from error


def fork_or_start(path: bytes, words: Sequence[str], passed: Sequence[int]) -> int:
    """In place of multiprocessing's: the engines' fork server is a fork that keeps only the files passed to it."""
    if not words[-1].startswith(ENGINES):
        return _started(path, words, passed)
    if pid := os.fork():
        return pid
    keep = {0, 1, 2, *passed}
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number not in keep:
            with contextlib.suppress(OSError):  # the one that listed them
                os.close(number)
    try:
        exec(words[-1], {})  # returns in no process, or as SystemExit when the server has gone
    finally:
        os._exit(0)

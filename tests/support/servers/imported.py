"""Runs the server's command in a process that has imported the server and its engines: a start takes a third.

Tests of what a server answers use it in place of the public command. Only three things differ. Nothing is imported.
vLLM inspects a model type that is new on this machine in this process, not in one that imports vLLM for it. The
engines' processes are forks of a fork of this process, not of an interpreter that was started for them. So they do not
carry the server's mark, and the watchdog would not find them: tests of starting, ending and being killed use the public
command.
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
"""The beginning of the command of the engines' fork server."""
_started = util.spawnv_passfds


def main() -> None:
    util.spawnv_passfds = fork_or_start
    registry._run_in_subprocess = look_here
    program()


def look_here(look: Callable[[], Any]) -> Any:
    """Replaces vLLM's function, which starts a process so that the inspection cannot initialize a GPU."""
    try:
        return look()
    except Exception as error:
        raise RuntimeError(f"Error raised in subprocess:\n{traceback.format_exc()}") from error


def fork_or_start(path: bytes, words: Sequence[str], passed: Sequence[int]) -> int:
    """Replaces multiprocessing's function: the engines' fork server is a fork that keeps only the files passed on."""
    if not words[-1].startswith(ENGINES):
        return _started(path, words, passed)
    if pid := os.fork():
        return pid
    keep = {0, 1, 2, *passed}
    for number in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if number not in keep:
            with contextlib.suppress(OSError):  # the file that listed them is closed already
                os.close(number)
    try:
        exec(words[-1], {})  # returns in no process, or as SystemExit when the server has gone
    finally:
        os._exit(0)

"""Ends a server's engine processes when the server dies, however it dies; a kill -9 included.

vLLM's processes do not notice a parent that was killed: they would hold the GPU for ever. So the server starts this
small process beside it, in a session of its own, and holds the other end of its standard input. When that closes,
every process that carries the server's mark in its environment is killed. Linux only, as the rest.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

MARK = "LIGHTREASONER_SERVER_PROCESS"
"""An environment variable that the engines' processes inherit."""
SETTLE_SECONDS, ROUNDS = 0.2, 10
"""A process that was about to start another may still do so while the first round is killed."""


def start() -> subprocess.Popen[bytes]:
    """Mark this process's future children and watch over them. The result must be kept as long as the process lives."""
    os.environ[MARK] = secrets.token_hex(16)
    command = [sys.executable, "-I", "-S", __file__, f"{MARK}={os.environ[MARK]}"]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)


def marked(mark: str) -> list[int]:
    """Processes that were started with `mark` ('NAME=value') in their environment, zombies aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone, or another user's
            continue
    return found


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a service's processes, they tell the server to end
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the server has closed its end, as the kernel does for the dead
    for _ in range(ROUNDS):
        for pid in marked(sys.argv[1]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(SETTLE_SECONDS)


if __name__ == "__main__":
    main()

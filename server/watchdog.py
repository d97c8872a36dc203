"""Kills a server's engine processes when the server dies, even by `kill -9`.

vLLM's processes do not notice that their parent was killed: they would hold the GPU for ever. So the server starts this
small process in a session of its own and holds the other end of its standard input. When that closes, the watchdog
kills every process that has the server's mark in its environment. Linux only.
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
TITLE_BESIDE = "SPT_NOENV"
"""Tells setproctitle, with which vLLM sets the titles of its processes, not to overwrite the environment in /proc."""
SETTLE_SECONDS, ROUNDS = 0.2, 10
"""Several rounds: a process may start another one while the first round is being killed."""


def start() -> subprocess.Popen[bytes]:
    """Mark this process's future children and start their watchdog. Keep the result while the process lives."""
    os.environ[MARK] = secrets.token_hex(16)
    os.environ[TITLE_BESIDE] = "1"
    command = [sys.executable, "-I", "-S", __file__, f"{MARK}={os.environ[MARK]}"]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)


def marked(mark: str) -> list[int]:
    """Ids of the processes with `mark` ('NAME=value') in their environment, without zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # gone, or another user's
            continue
    return found


def main() -> None:
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a service manager sends them to all processes; only the server obeys
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()  # returns when the server closes its end, or the kernel does after its death
    for _ in range(ROUNDS):
        for pid in marked(sys.argv[1]):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(SETTLE_SECONDS)


if __name__ == "__main__":
    main()

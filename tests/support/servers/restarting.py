"""A server that can be killed and started again at the same address, on the same bucket."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from typing import Any

from support.servers.real_server import RunningServer, free_port

OPEN_JOBS, QUEUED, LEASE_SECONDS = 4, 50, 2
"""Low limits, and a short lease, for the session's `service`."""
SERVICE = {
    "key": "a-key", "lease_seconds": LEASE_SECONDS,
    "limits": {"open_jobs": OPEN_JOBS, "queued_trajectories": QUEUED, "job_trajectories": 9000},
}  # fmt: skip


class Restarting:
    """Has all attributes of the server that runs at the moment."""

    def __init__(self, running: Callable[..., contextlib.AbstractContextManager[RunningServer]]) -> None:
        """`running`: starts a server at a given port."""
        self._running, self._port, self._stack = running, free_port(), contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        self._server = self._stack.enter_context(self._running(port=self._port))

    def kill(self) -> None:
        """kill -9, to the server and its engines."""
        self._server.signal(signal.SIGKILL)
        self._server.process.wait()
        self._stack.close()

    def close(self) -> None:
        self._stack.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._server, name)

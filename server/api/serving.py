"""Runs and ends the HTTP server: the first signal drains it, the second ends the process at once."""

from __future__ import annotations

import asyncio
import functools
import os
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from server.api.connections import KEEP_ALIVE_SECONDS, REQUEST_HEAD_BYTES, BoundedConnection, allow_connections
from server.logs import log

INTERRUPTED = 130
"""The exit status after a second signal, as of a process that SIGINT ended. The watchdog (`server.watchdog`) ends the
engines."""

CLOSING_SECONDS = 5
"""Time for connections to close after their last answer."""
ENDING_SECONDS = 15.0
"""Time for engines and threads to end after the drain. Then the process exits anyway."""


class DrainingServer(uvicorn.Server):
    """uvicorn's server. On SIGTERM or SIGINT it drains first, then exits with status 0."""

    def __init__(self, app: ASGIApp, drain: Callable[[], Awaitable[None]]) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            http=functools.partial(BoundedConnection, most_connections=allow_connections()),  # type: ignore[arg-type]
            ws="none",
            h11_max_incomplete_event_size=REQUEST_HEAD_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        super().__init__(config)
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by a signal. uvicorn's own handler would stop listening at once and re-raise the signal."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._told_to_stop)

    def _told_to_stop(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain_and_exit())
        else:
            log.warning("told to stop a second time: stopping at once")
            os._exit(INTERRUPTED)

    async def _drain_and_exit(self) -> None:
        try:
            await self._drain()
        finally:
            self.should_exit = True
            ending = threading.Timer(ENDING_SECONDS, _end)
            ending.daemon = True  # it does not keep a process alive that has ended
            ending.start()


def _end() -> None:
    """Exit a drained process whose threads are still waiting."""
    log.warning("still stopping after %g s: exiting now", ENDING_SECONDS)
    os._exit(0)

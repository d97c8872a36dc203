"""How the HTTP server runs and ends: the first signal drains, the second ends the process as it is."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from server.logs import log

INTERRUPTED = 130
"""The exit status after a second signal, as shells have it. The watchdog (`server.watchdog`) ends the engines."""

CLOSING_SECONDS = 5
"""For connections to close, when all that they asked for has been sent."""
ENDING_SECONDS = 15.0
"""For all the rest once drained: engines, threads that wait for a store. Then the process ends as it is."""
KEEP_ALIVE_SECONDS = 75
"""Above what clients and balancers keep an idle connection for, so that it is they who close it."""


class DrainingServer(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT drains first and then ends as a success."""

    def __init__(self, app: ASGIApp, drain: Callable[[], Awaitable[None]]) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
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
        """Called by a signal. uvicorn's own would stop listening at once, and end the process by the same signal."""
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
            ending.daemon = True  # it does not keep a process that has ended before
            ending.start()


def _end() -> None:
    """End a process that was drained, though a thread of it still waits for something."""
    log.warning("still stopping after %g s: ending as it is", ENDING_SECONDS)
    os._exit(0)

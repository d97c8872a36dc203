"""The pair of a process that samples alone (`lightreasoner-server sample`), without HTTP or jobs.

In: settings. Out: a source of trajectories. Its engines start when the sampler waits for them, so that none start for a
complete RUN, and end with `aclose`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

from server.engines import start
from server.engines.pair import Pair
from server.engines.preflight import inspect_models
from server.jobs.pair_source import PairSource, installed_versions
from server.settings import ServerSettings


class OwnPair(PairSource):
    """A pair that only this process uses. The watchdog must have started."""

    def __init__(self, settings: ServerSettings) -> None:
        super().__init__(None, installed_versions(), alone=True)
        self._settings = settings
        self._watching: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return "the pair"

    async def wait_until_ready(self, tell: Callable[[str], None]) -> None:
        """Check the two models, start both engines and warm them up.

        Raises SettingsError, ModelError or EngineStartError.
        """
        tell("its engines start")
        self.pair = await asyncio.to_thread(self._started)
        await self.pair.warm_up()
        self._watching = asyncio.create_task(self.pair.watch(self._settings.hang_seconds))

    async def aclose(self) -> None:
        """Stop the engines, if they started."""
        if self._watching:
            self._watching.cancel()
        with contextlib.suppress(AttributeError):
            await asyncio.to_thread(self.pair.shutdown)

    def _started(self) -> Pair:
        settings, facts = inspect_models(self._settings)
        return start.start_pair(settings, facts, threading.Event())

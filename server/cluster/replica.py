"""A replica: one pair, both engines, in a process that Ray starts, checks and ends.

In: settings, and calls of the front (`server.cluster.remote`). Out: trajectories, or why there is none. A replica whose
engine died ends, and Ray starts another one; the front then retries its requests.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass

from client.protocol.requests import Failure, PairCards, Problem, SamplingSettings, Trajectory
from client.servers.window import PAIR_FIELDS
from server import logs, watchdog
from server.engines import forkserver
from server.engines.pair import Pair, Turn
from server.engines.preflight import inspect_models
from server.engines.prompts import Accepted, TrajectoryError
from server.engines.start import start_pair
from server.logs import log
from server.settings import ServerSettings

StartPair = Callable[[ServerSettings], Pair]


def pair_mark(cards: PairCards) -> str:
    """A mark that is equal for two pairs that may fill one RUN."""
    return repr([getattr(card, field) for card in cards for field in PAIR_FIELDS])


@dataclass(frozen=True)
class PairDescription:
    """The facts that a front needs of a pair. All replicas have the same, except during a new deployment."""

    cards: PairCards
    accepted: Accepted
    ends_as_early: bool
    tokenizer: bytes


class PairReplica:
    """The pair, as a deployment of Ray Serve."""

    async def __init__(self, settings: ServerSettings, start: StartPair) -> None:  # type: ignore[misc]
        logs.configure()
        self.pair = await asyncio.to_thread(start, settings)
        await self.pair.warm_up()
        self._mark = pair_mark(self.cards)
        self._watching = asyncio.create_task(self.pair.watch(settings.hang_seconds))
        log.info("the pair is ready")

    @property
    def cards(self) -> PairCards:
        return PairCards(self.pair.card(self.pair.expert), self.pair.card(self.pair.amateur))

    async def describe(self) -> PairDescription:
        """Describe the pair for the front."""
        pair = self.pair
        tokenizer = await asyncio.to_thread((pair.facts.expert.folder / "tokenizer.json").read_bytes)
        return PairDescription(self.cards, pair.accepted, pair.prompts.ends_as_early, tokenizer)

    async def trajectory(
        self, problem: Problem, sample_index: int, sampling: SamplingSettings, priority: int, mark: str
    ) -> Trajectory | Failure | None:
        """A problem's trajectory, or why it failed; None if the front expects another pair.

        After an engine has died, this never returns.
        """
        if mark != self._mark:
            return None
        try:
            return await self.pair.trajectory(problem, sample_index, sampling, Turn(priority))
        except TrajectoryError as error:
            if self.pair.failure():  # a quick answer would attract all problems here, until Ray ends this replica
                await asyncio.Event().wait()
            return Failure(problem.id, sample_index, error.type, error.detail)

    async def check_health(self) -> None:
        """Ray calls this every few seconds. If an engine has died, this process ends: Ray starts another replica.

        The front then retries at once. If the replica were only reported as unhealthy, Ray would first wait for its
        requests.
        """
        if reason := self.pair.failure():
            log.error("this replica ends: %s", reason)
            os._exit(1)

    async def __del__(self) -> None:
        if hasattr(self, "pair"):
            await asyncio.to_thread(self.pair.shutdown)


_watchdogs: list[subprocess.Popen[bytes]] = []
"""The pipe of this process's watchdog closes with the process."""


def checked_and_started(settings: ServerSettings) -> Pair:
    """Check the pair and start both engines; blocks. Raises LightReasonerError if the pair cannot serve."""
    _watchdogs.append(watchdog.start())
    forkserver.start()
    settings, facts = inspect_models(settings)
    return start_pair(settings, facts, threading.Event())

"""The server's own pair as the sampler's source of trajectories, where the client would use HTTP.

In: problems and how to answer them. Out: trajectories and failures as each completes, behind all HTTP requests.
It never fills more than a share of the engines' slots, and never writes to the bucket.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from client.errors import ServiceError
from client.protocol.requests import Failure, PairCards, Problem, SamplingSettings, Trajectory
from server.engines.pair import JOB, Pair, Turn
from server.engines.prompts import TrajectoryError
from server.logs import log

SHARE_OF_SLOTS = 0.75
"""Share of the engines' slots that jobs may fill, so that a request soon finds a free one."""


class PairSource:
    """The pair as the sampler's source of answers."""

    asks_again = False  # the job does, in its next attempt

    def __init__(self, pair: Pair, versions: dict[str, str]) -> None:
        self.pair, self.stopping = pair, False
        self._versions = versions
        self._running: set[asyncio.Task[Trajectory | Failure]] = set()

    def __str__(self) -> str:
        return "the server's pair"

    def stop(self) -> None:
        """`trajectories` ends after what has been answered; what is in the engines is dropped."""
        self.stopping = True
        for task in self._running:
            task.cancel()

    async def wait_until_ready(self, tell: Callable[[str], None]) -> None:
        """It is: jobs are worked on once the pair is."""

    async def models(self) -> PairCards:
        return PairCards(self.pair.card(self.pair.expert), self.pair.card(self.pair.amateur))

    async def tokenizer(self) -> bytes:
        file = self.pair.facts.expert.folder / "tokenizer.json"
        return await asyncio.to_thread(file.read_bytes)

    async def versions(self) -> dict[str, str]:
        return self._versions

    async def trajectories(
        self, problems: Iterable[Problem], sampling: SamplingSettings
    ) -> AsyncIterator[Trajectory | Failure]:
        """Every trajectory as it completes, behind all requests. Raises ServiceError when an engine has died."""
        answered: asyncio.Queue[asyncio.Task[Trajectory | Failure]] = asyncio.Queue()
        waiting = ((problem, index) for problem in problems for index in range(sampling.n))
        most = max(1, int(SHARE_OF_SLOTS * min(self.pair.expert.slots, self.pair.amateur.slots)))
        turn = Turn(priority=JOB)
        try:
            while True:
                while not self.stopping and len(self._running) < most and (asked := next(waiting, None)):
                    if reason := self.pair.failure():
                        raise ServiceError(reason)
                    task = asyncio.create_task(self._answer(*asked, sampling, turn))
                    self._running.add(task)
                    task.add_done_callback(answered.put_nowait)
                    await asyncio.sleep(0)  # each begins with work on the event loop, which requests need as well
                if not self._running:
                    return
                task = await answered.get()
                self._running.discard(task)
                if not task.cancelled():
                    yield task.result()
        finally:
            for task in self._running:
                task.cancel()
            self._running.clear()

    async def _answer(
        self, problem: Problem, index: int, sampling: SamplingSettings, turn: Turn
    ) -> Trajectory | Failure:
        try:
            return await self.pair.trajectory(problem, index, sampling, turn)
        except TrajectoryError as error:
            return Failure(problem.id, index, error.type, error.detail)
        except Exception as error:  # one problem must never take its neighbours with it
            log.exception("problem %r failed", problem.id)
            return Failure(problem.id, index, "internal_error", f"{type(error).__name__}: {error}")

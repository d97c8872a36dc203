"""The response to POST /v1/trajectories: a line as each trajectory completes, bounded if the client reads slowly.

The queue counts accepted trajectories that are not sent yet. Each request has a bounded number of trajectories that
run or wait to be read (`window_of`), so that a client that stops reading soon costs nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from client.protocol.requests import Encoding, Failure, Problem, Trajectory, TrajectoryRequest
from server import metrics
from server.engines.prompts import TrajectoryError
from server.logs import log

HEARTBEAT_SECONDS = 10.0
"""After this long without a line, a blank one is sent, so that no proxy closes the connection."""
WINDOW = 256
"""The most trajectories of one request that run or wait to be read."""
WAITING_BYTES = 512 * 1024**2
"""The most bytes of one request's lines that wait to be read."""
VALUE_BYTES: dict[Encoding, int] = {"json": 50, "base64": 16}
"""Bytes of one id with both log-probabilities in a line."""
LINE_PIECE_BYTES = 64 * 1024
"""Bytes that a connection is given at a time. The rest of a line waits here, where it is counted."""
QUEUE_RETRY_SECONDS = 2
NDJSON = "application/x-ndjson"

TrajectoryOf = Callable[[Problem, int], Awaitable[Trajectory]]


class UnreadLines:
    """Counts the lines of all responses that wait to be read. Beyond `most` bytes the slowest reader is cut off."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0
        self._by_stream: dict[TrajectoryStream, int] = {}

    def add(self, stream: TrajectoryStream, size: int) -> None:
        """Count a waiting line. While there are too many bytes, disconnect the reader that was idle longest.

        The last reader stays: its own window bounds it, and one line may be larger than the bound.
        """
        if stream not in self._by_stream:
            stream.waiting_since = time.monotonic()
        self._by_stream[stream] = self._by_stream.get(stream, 0) + size
        self.bytes += size
        while self.bytes > self.most and len(self._by_stream) > 1:
            slowest = min(self._by_stream, key=lambda one: one.waiting_since)
            self.drop(slowest)
            slowest.cut()

    def take(self, stream: TrajectoryStream, size: int) -> None:
        """Stop counting a line that was handed to its connection."""
        if stream in self._by_stream:
            self._by_stream[stream] -= size
            self.bytes -= size
            if not self._by_stream[stream]:
                del self._by_stream[stream]

    def drop(self, stream: TrajectoryStream) -> None:
        """Stop counting a stream's lines: nobody will read the rest."""
        self.bytes -= self._by_stream.pop(stream, 0)


class RequestQueue:
    """Trajectories that requests asked for and have not received yet: bounded, and emptied when the server stops."""

    def __init__(self, most: int, keys: int = 1) -> None:
        """`keys`: the number that share the queue. A key below its share has room, even if others fill the queue."""
        self.most, self.depth = most, 0
        self._share, self._by_key = most // keys, Counter[str | None]()
        self.expired = False  # the grace period is over
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._change(0, None)

    def enter(self, count: int, key_name: str | None = None) -> None:
        """Accept `count` trajectories for a key. Answers 429 if the queue has no room for them now."""
        if self.depth + count > self.most and self._by_key[key_name] + count > self._share:
            raise HTTPException(
                429,
                f"{self.depth} trajectories are queued and {count} more would exceed the bound of {self.most}",
                headers={"Retry-After": str(QUEUE_RETRY_SECONDS)},
            )
        self._change(count, key_name)

    def leave(self, count: int, key_name: str | None = None) -> None:
        """Remove `count` trajectories of a key that were sent or dropped."""
        self._change(-count, key_name)

    def work(self, line: Awaitable[None]) -> asyncio.Task[None]:
        """Start a task that `drain` can cancel."""
        task = asyncio.ensure_future(line)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def drain(self, grace_seconds: float) -> None:
        """Return when the queue is empty. Trajectories that still run after the grace period get an error line."""
        try:
            await asyncio.wait_for(self._empty.wait(), grace_seconds)
        except TimeoutError:
            log.warning("stopping: dropped %d trajectories after %.0f s", self.depth, grace_seconds)
            self.expired = True
            for task in self._tasks:
                task.cancel()

    def _change(self, by: int, key_name: str | None) -> None:
        self.depth += by
        self._by_key[key_name] += by
        metrics.QUEUE_DEPTH.set(self.depth)
        (self._empty.clear if self.depth else self._empty.set)()


def window_of(asked: TrajectoryRequest, waiting_bytes: int = WAITING_BYTES) -> int:
    """How many trajectories of a request may run or wait to be read: the longer the lines, the fewer."""
    steps = max(len(problem.token_ids) if problem.token_ids else asked.max_tokens for problem in asked.problems)
    line = steps * asked.top_k * VALUE_BYTES[asked.encoding]
    return min(WINDOW, max(1, min(WAITING_BYTES, waiting_bytes) // line))


class TrajectoryStream(StreamingResponse):
    """The trajectories of one request as NDJSON. The queue has accepted them before."""

    def __init__(
        self,
        asked: TrajectoryRequest,
        trajectory_of: TrajectoryOf,
        queue: RequestQueue,
        unread: UnreadLines,
        key_name: str | None = None,
    ) -> None:
        self._trajectory_of, self._encoding, self._key_name = trajectory_of, asked.encoding, key_name
        self._queue, self._unread = queue, unread
        self.waiting_since = time.monotonic()
        """When its reader last took bytes, or the first line began to wait for it."""
        self._idle = 0.0
        self._patience = asyncio.timeout(None)
        wanted = [(problem, index) for problem in asked.problems for index in range(asked.n)]
        self._unsent = len(wanted)
        self._window = asyncio.Semaphore(window_of(asked, unread.most // 2))
        self._lines: asyncio.Queue[bytes] = asyncio.Queue()
        self._generator = self._generate(wanted)
        super().__init__(self._generator, media_type=NDJSON)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._patience:
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("too many lines wait to be read: cut the reader that took nothing for %.1f s", self._idle)
            metrics.ERRORS.labels("slow_reader").inc()
            raise ClientDisconnect from None
        finally:
            self._unread.drop(self)
            await self._generator.aclose()
            self._queue.leave(self._unsent, self._key_name)

    def cut(self) -> None:
        """End this stream and its connection now."""
        if self._patience.when() is None:
            self._idle = time.monotonic() - self.waiting_since
            self._patience.reschedule(0)

    async def _generate(self, wanted: list[tuple[Problem, int]]) -> AsyncGenerator[bytes, None]:
        """The lines. When the client disconnects, the generator is closed and cancels the running trajectories."""
        tasks = [self._queue.work(self._line(problem, index)) for problem, index in wanted]
        try:
            while self._unsent:
                try:
                    line = await asyncio.wait_for(self._lines.get(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield b"\n"
                    continue
                for start in range(0, len(line), LINE_PIECE_BYTES):
                    yield line[start : start + LINE_PIECE_BYTES]
                    self.waiting_since = time.monotonic()
                self._unread.take(self, len(line))
                self._unsent -= 1
                self._queue.leave(1, self._key_name)
                self._window.release()
        finally:
            for task in tasks:
                task.cancel()

    async def _line(self, problem: Problem, index: int) -> None:
        try:
            await self._window.acquire()
            line = (await self._trajectory_of(problem, index)).to_line(self._encoding)
        except TrajectoryError as error:
            line = Failure(problem.id, index, error.type, error.detail).to_line()
        except asyncio.CancelledError:
            if not self._queue.expired:
                raise
            metrics.ERRORS.labels("server_stopping").inc()
            line = Failure(
                problem.id, index, "server_stopping", "the server stopped; retry, or use another server"
            ).to_line()
        except Exception as error:  # one problem must not fail the others
            log.exception("problem %r failed", problem.id)
            line = Failure(problem.id, index, "internal_error", f"{type(error).__name__}: {error}").to_line()
        self._lines.put_nowait(line)
        self._unread.add(self, len(line))

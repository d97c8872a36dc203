"""Async HTTP to one or several servers of the same pair: waits for them, checks that they agree, streams trajectories.

In: problems and sampling settings. Out: `Trajectory` and `Failure` values as they complete, each once; the number of
open requests is bounded. Errors that may pass are retried (`client.servers.dispatch`); others are a ServiceError that
names the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Self, TypeVar

from client.errors import ServiceError, Stopped, Unreachable
from client.protocol.requests import Failure, PairCards, Problem, SamplingSettings, Trajectory
from client.retries import retry
from client.servers.connection import Connection
from client.servers.dispatch import Dispatch
from client.servers.window import ServerWindow, pair_differences

Answered = TypeVar("Answered")
SERVER_PATIENCE_SECONDS = 1800.0
"""How long to wait for servers to start (large models take long), and for any answer."""
READY_POLL_SECONDS = 1.0
LEAST_FIELDS = ("max_model_len", "max_logprobs", "slots")
"""Fields of a model's card in which servers of one pair may differ."""


class SamplingClient:
    """A connection to one server, or to several that serve the same pair.

    async with SamplingClient(["http://gpu-1:8000", "http://gpu-2:8000"]) as client:
        async for line in client.trajectories(problems):
            ...

    `patience`: how long to wait for servers to become ready, and for any answer, in seconds. `tell` is called when a
    server is lost and when it is back.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        api_key: str | None = None,
        patience: float = SERVER_PATIENCE_SECONDS,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        urls = dict.fromkeys(url.rstrip("/") for url in ([servers] if isinstance(servers, str) else servers))
        if not urls:
            raise ServiceError("no server given; give at least one URL")
        self.stopping = False
        self.asks_again = True
        self._connections = [Connection(url, api_key) for url in urls]
        self._patience, self._tell = patience, tell
        self._pairs: list[PairCards] = []  # each connection's, once all are ready
        self._calls: list[Dispatch] = []

    def __str__(self) -> str:
        return ", ".join(map(str, self._connections))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._connections:
            await connection.aclose()

    def status(self) -> list[str]:
        """Each server's state in words, during a call of `trajectories`."""
        return [str(server) for call in self._calls for server in call.servers]

    def stop(self) -> None:
        """Send no more requests. `trajectories` returns what servers have sent, and ends within two seconds."""
        self.stopping = True
        for call in self._calls:
            call.stop()

    async def wait_until_ready(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Return when every server is ready and all serve the same pair. `tell` is called with what it waits for.

        Raises ServiceError if a server cannot be reached, has failed, serves another pair, or takes longer than
        `patience`.
        """
        for connection in self._connections:
            try:
                await self._until_ready(connection, tell)
            except Unreachable as error:
                if len(self._connections) == 1:
                    raise
                raise ServiceError(f"{error} To sample with the other servers, omit its --server") from error
        pairs = [await self._retried(connection.models) for connection in self._connections]
        for connection, pair in zip(self._connections, pairs, strict=True):
            if different := pair_differences(pairs[0], pair):
                listed = "\n  ".join(("all must serve the same pair. The first's against the other's:", *different))
                raise ServiceError(f"{self._connections[0]} and {connection} differ; {listed}")
        self._pairs = pairs

    async def models(self) -> PairCards:
        """The expert's card and the amateur's; of several servers, with the least that any takes."""
        if not self._pairs:
            await self.wait_until_ready(self._tell)
        return _least(self._pairs)

    async def tokenizer(self) -> bytes:
        """The expert's tokenizer.json."""
        return await self._retried(self._connections[0].tokenizer)

    async def versions(self) -> dict[str, str]:
        """Versions of the first server and of the packages that its results depend on."""
        return await self._retried(self._connections[0].versions)

    async def trajectories(
        self, problems: Iterable[Problem], sampling: SamplingSettings | None = None
    ) -> AsyncGenerator[Trajectory | Failure, None]:
        """Every trajectory of `problems` once, as it completes, or a `Failure`. After `stop` it ends early.

        Raises ServiceError if every server rejects requests or none answers for `patience` seconds, after everything
        that was answered; LightReasonerError if the problems make no valid request. `sampling` defaults to the
        published settings.
        """
        sampling = sampling or SamplingSettings()
        await self.models()
        servers = [ServerWindow(*each) for each in zip(self._connections, self._pairs, strict=True)]
        call = Dispatch(servers, problems, sampling, self._patience, self._tell)
        self._calls.append(call)
        if self.stopping:
            call.stop()
        try:
            async with aclosing(call.lines()) as lines:
                async for line in lines:
                    yield line
        finally:
            self._calls.remove(call)

    async def _until_ready(self, connection: Connection, tell: Callable[[str], None]) -> None:
        deadline, told = time.monotonic() + self._patience, ""

        async def ask() -> None:
            reason: str | None = "it does not respond"
            with contextlib.suppress(TimeoutError):
                reason = await asyncio.wait_for(connection.why_not_ready(), max(deadline - time.monotonic(), 0.1))
            if reason:
                raise NotReady(reason)

        def tell_once(reason: BaseException) -> None:
            nonlocal told
            if str(reason) != told:
                told = str(reason)
                tell(told if len(self._connections) == 1 else f"{connection}: {told}")

        try:
            await self._retried(ask, NotReady, tell_once)
        except NotReady as reason:
            if self.stopping:
                raise Stopped(f"stopped waiting for {connection}; it has not been asked yet") from None
            raise ServiceError(f"{connection} is still not ready after {self._patience:g} s: {reason}") from None

    async def _retried(
        self,
        ask: Callable[[], Awaitable[Answered]],
        passing: type[Exception] = Unreachable,
        tell: Callable[[BaseException], None] = lambda _: None,
    ) -> Answered:
        """What a server answers. Retried after a `passing` error, for at most `patience` seconds."""
        return await retry(
            ask,
            may_pass=lambda error: isinstance(error, passing),
            pause=READY_POLL_SECONDS,
            seconds=self._patience,
            stopping=lambda: self.stopping,
            tell=tell,
        )


class NotReady(Exception):
    """A server is still starting; the message says what it waits for."""


def _least(pairs: Sequence[PairCards]) -> PairCards:
    """The cards of a pair that several servers serve, with the smallest context, max_logprobs and slots of all."""
    expert, amateur = (
        cards[0].model_copy(update={name: min(getattr(card, name) for card in cards) for name in LEAST_FIELDS})
        for cards in zip(*pairs, strict=True)
    )
    return PairCards(expert, amateur)

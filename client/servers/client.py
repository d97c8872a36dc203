"""Async HTTP to one or several servers of the same pair: waits for them, checks that they agree, streams trajectories.

In: problems and sampling settings. Out: `Trajectory` and `Failure` values as they complete, each once; the number of
open requests is bounded. Errors that may pass are retried (`client.servers.dispatch`); others are a ServiceError that
names the server. During a call, DNS names are looked up again at intervals (`client.servers.following`).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import Self, TypeVar

from client.errors import ServiceError, Stopped, TlsError, Unreachable
from client.protocol.requests import Failure, PairCards, Problem, SamplingSettings, Trajectory
from client.retries import retry
from client.servers.connection import Connection
from client.servers.dispatch import Dispatch
from client.servers.following import Following, pair_if_ready
from client.servers.names import ServerName, names_and_urls
from client.servers.window import ServerWindow, pair_differences

LOG = logging.getLogger(__name__)
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

    `http+dns://name:8000` stands for a server at each address behind the name; they may come and go. `patience`: how
    long to wait for servers to become ready, and for any answer, in seconds. `tell` is called with the reason for
    waiting, when a server stops answering, and when it is back; by default it logs a warning.
    """

    def __init__(
        self,
        servers: str | Sequence[str],
        api_key: str | None = None,
        patience: float = SERVER_PATIENCE_SECONDS,
        tell: Callable[[str], None] = LOG.warning,
    ) -> None:
        self.stopping = False
        self.asks_again = True
        self._names, self._connections = names_and_urls([servers] if isinstance(servers, str) else servers, api_key)
        self._patience, self._tell = patience, tell
        self._pairs: dict[Connection, PairCards] = {}  # of the servers that were ready at the start, or joined since
        self._calls: list[Dispatch] = []

    def __str__(self) -> str:
        return ", ".join(map(str, (*self._connections, *self._names)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in {*self._pairs, *self._there()}:
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
        """Return when every server, and one behind each name, is ready and all serve the same pair.

        `tell` is called with the reason for waiting. Raises ServiceError if a server has failed, serves another pair,
        is not ready after `patience`, or cannot be reached for that long.
        """
        for connection in self._connections:
            await self._until_ready(connection, tell)
        pairs = {connection: await self._retried(connection.models) for connection in self._connections}
        for name in self._names:
            pairs |= await self._until_one_is_ready(name, tell)
        first = next(iter(pairs))
        for connection, pair in pairs.items():
            if different := pair_differences(pairs[first], pair):
                listed = "\n  ".join(("all must serve the same pair. The first's against the other's:", *different))
                raise ServiceError(f"{first} and {connection} differ; {listed}")
        self._pairs = pairs

    async def models(self) -> PairCards:
        """The expert's card and the amateur's; for several servers, with the smallest limits of all."""
        if not self._pairs:
            await self.wait_until_ready(self._tell)
        return _least(list(self._pairs.values()))

    async def tokenizer(self) -> bytes:
        """The expert's tokenizer.json."""
        return await self._asked_of_any(Connection.tokenizer)

    async def versions(self) -> dict[str, str]:
        """Versions of a server and of the packages that its results depend on."""
        return await self._asked_of_any(Connection.versions)

    async def trajectories(
        self, problems: Iterable[Problem], sampling: SamplingSettings | None = None
    ) -> AsyncGenerator[Trajectory | Failure, None]:
        """Every trajectory of `problems` once, as it completes, or a `Failure`. After `stop` it ends early.

        After all results that were sent, raises ServiceError if every server rejects requests, or none answers for
        `patience` seconds. Raises LightReasonerError if the problems do not make a valid request. `sampling` defaults
        to the published settings.
        """
        sampling = sampling or SamplingSettings()
        await self.models()
        there = self._there()
        servers = [ServerWindow(one, pair) for one, pair in self._pairs.items() if one in there]
        call = Dispatch(servers, problems, sampling, self._patience, self._tell)
        self._calls.append(call)
        if self.stopping:
            call.stop()
        following = asyncio.create_task(Following(self._names, self._connections, self._pairs, call, self._tell).run())
        try:
            async with aclosing(call.lines()) as lines:
                async for line in lines:
                    yield line
        finally:
            following.cancel()
            self._calls.remove(call)

    def _there(self) -> list[Connection]:
        """The servers of every --server, by the last lookup of the names."""
        return [*self._connections, *(one for name in self._names for one in name.connections.values())]

    async def _asked_of_any(self, question: Callable[[Connection], Awaitable[Answered]]) -> Answered:
        """Ask the first server, or the next one if the first is gone."""
        if not self._pairs:
            await self.wait_until_ready(self._tell)
        servers = itertools.cycle(list(self._pairs))
        return await self._retried(lambda: question(next(servers)))

    async def _until_one_is_ready(self, name: ServerName, tell: Callable[[str], None]) -> dict[Connection, PairCards]:
        """The pairs of the servers behind a name that are ready; waits until there is one.

        Raises ServiceError if all reject requests. An unreachable server may be replaced, so it waits for that.
        """

        async def ask() -> dict[Connection, PairCards]:
            await name.read()
            connections = list(name.connections.values())
            found = await asyncio.gather(*(pair_if_ready(one) for one in connections))
            errors = sorted((one for one in found if isinstance(one, ServiceError)), key=_passing, reverse=True)
            if len(errors) == len(found):
                raise errors[0]
            return {one: pair for one, pair in zip(connections, found, strict=True) if isinstance(pair, PairCards)}

        told: set[str] = set()

        def tell_once(reason: BaseException) -> None:
            if str(reason) not in told:
                tell(str(reason) if told else f"{reason} (for at most {self._patience:g} s)")
                told.add(str(reason))

        try:
            return await self._retried(ask, tell=tell_once)
        except Unreachable as reason:
            if self.stopping:
                raise Stopped(f"stopped waiting for {name}; it received no request") from None
            if isinstance(reason, TlsError):
                raise
            raise ServiceError(f"no server behind {name} is ready after {self._patience:g} s: {reason}") from None

    async def _until_ready(self, connection: Connection, tell: Callable[[str], None]) -> None:
        deadline, told = time.monotonic() + self._patience, ""

        async def ask() -> None:
            reason: str | None = "it does not respond"
            try:
                with contextlib.suppress(TimeoutError):
                    reason = await asyncio.wait_for(connection.why_not_ready(), max(deadline - time.monotonic(), 0.1))
            except TlsError:
                raise
            except Unreachable as error:
                reason = str(error)
            if reason:
                raise NotReady(reason)

        def tell_once(reason: BaseException) -> None:
            nonlocal told
            if str(reason) != told:
                waits = str(reason) if told else f"{reason} (for at most {self._patience:g} s)"
                told = str(reason)
                tell(waits if len(self._connections) == 1 else f"{connection}: {waits}")

        try:
            await self._retried(ask, NotReady, tell_once)
        except NotReady as reason:
            if self.stopping:
                raise Stopped(f"stopped waiting for {connection}; it received no request") from None
            alone = len(self._connections) + len(self._names) == 1
            raise ServiceError(
                f"{connection} is still not ready after {self._patience:g} s: {reason}"
                f"{'' if alone else '. To sample with the other servers, omit its --server'}"
            ) from None

    async def _retried(
        self,
        ask: Callable[[], Awaitable[Answered]],
        passing: type[Exception] = Unreachable,
        tell: Callable[[BaseException], None] = lambda _: None,
    ) -> Answered:
        """Call `ask`, with retries after a `passing` error, for at most `patience` seconds.

        An invalid certificate is not retried: a person has to correct it.
        """
        return await retry(
            ask,
            may_pass=lambda error: isinstance(error, passing) and not isinstance(error, TlsError),
            pause=READY_POLL_SECONDS,
            seconds=self._patience,
            stopping=lambda: self.stopping,
            tell=tell,
        )


class NotReady(Exception):
    """A server is still starting, or is not there yet; the message says what it waits for."""


def _passing(error: ServiceError) -> bool:
    return isinstance(error, Unreachable) and error.may_pass


def _least(pairs: Sequence[PairCards]) -> PairCards:
    """The cards of a pair that several servers serve, with the smallest context, max_logprobs and slots of all."""
    expert, amateur = (
        cards[0].model_copy(update={name: min(getattr(card, name) for card in cards) for name in LEAST_FIELDS})
        for cards in zip(*pairs, strict=True)
    )
    return PairCards(expert, amateur)

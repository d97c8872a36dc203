"""Async HTTP to a server: waits for it, asks what it serves, and streams trajectories of many problems.

In: problems and how to answer them. Out: `Trajectory` and `Failure` values, as they complete, with a bounded
number of problems in flight. Whatever goes wrong with the server is a ServiceError that names it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import httpx

from client.errors import ServiceError
from client.protocol import (
    DEFAULT_TOP_K,
    SYSTEM_PROMPT,
    Decoding,
    Failure,
    ModelCard,
    ModelList,
    Problem,
    Trajectory,
    TrajectoryRequest,
    parse_line,
)

PROBLEMS_IN_FLIGHT = 256
PROBLEMS_A_REQUEST = 16
"""Small, so that no request waits long for its slowest problem; large enough that HTTP costs nothing."""
READY_SECONDS, READY_POLL_SECONDS = 1800.0, 1.0
"""How long a server may take to start, as one with large models does, and how often it is asked."""
READ_TIMEOUT_SECONDS = 60.0
"""Without a line or a heartbeat for this long, the server is taken for dead; heartbeats come every 10 s."""


@dataclass(frozen=True)
class Asking:
    """How problems are to be answered: everything of a request but the problems."""

    decoding: Decoding = field(default_factory=Decoding)
    top_k: int = DEFAULT_TOP_K
    system_prompt: str | None = SYSTEM_PROMPT
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def request(self, problems: list[Problem]) -> bytes:
        """The body of POST /v1/trajectories for some problems."""
        request = TrajectoryRequest(
            **self.decoding.model_dump(),
            problems=problems,
            top_k=self.top_k,
            system_prompt=self.system_prompt,
            chat_template_kwargs=self.chat_template_kwargs,
            encoding="base64",
        )
        return request.model_dump_json().encode()


class SamplingClient:
    """A connection to one server.

    async with SamplingClient("http://127.0.0.1:8000") as client:
        async for line in client.trajectories(problems, Asking()):
            ...
    """

    def __init__(self, server: str) -> None:
        self.server = server.rstrip("/")
        try:
            limits = httpx.Limits(max_connections=PROBLEMS_IN_FLIGHT // PROBLEMS_A_REQUEST + 4)
            timeout = httpx.Timeout(READ_TIMEOUT_SECONDS, connect=10.0)
            self._http = httpx.AsyncClient(base_url=self.server, timeout=timeout, limits=limits)
        except (httpx.InvalidURL, TypeError) as error:
            raise ServiceError(f"--server {server!r} is no URL: {error}") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def wait_until_ready(self, tell: Callable[[str], None] = lambda _: None) -> None:
        """Return when the server is ready; `tell` hears, once each, what it waits for.

        Raises ServiceError when there is no server, when it has failed, or after `READY_SECONDS`.
        """
        deadline, told = time.monotonic() + READY_SECONDS, ""
        while True:
            response = await self._get("/ready")
            if response.status_code == 200:
                return
            reason = _detail(response)
            if response.status_code != 503 or "retry-after" not in response.headers:
                raise ServiceError(f"{self.server} cannot serve: {reason}")
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.server} is still not ready after {READY_SECONDS:.0f} s: {reason}")
            if reason != told:
                tell(told := reason)
            await asyncio.sleep(READY_POLL_SECONDS)

    async def models(self) -> tuple[ModelCard, ModelCard]:
        """The expert's card and the amateur's."""
        cards = {card.role: card for card in ModelList.model_validate_json((await self._ok("/v1/models")).content).data}
        return cards["expert"], cards["amateur"]

    async def tokenizer(self) -> bytes:
        """The expert's tokenizer.json."""
        return (await self._ok("/v1/tokenizer")).content

    async def versions(self) -> dict[str, str]:
        """Versions of the server and of what its numbers rest on."""
        return (await self._ok("/version")).json()

    async def trajectories(self, problems: Iterable[Problem], asking: Asking) -> AsyncIterator[Trajectory | Failure]:
        """Every trajectory of `problems` as it completes; at most `PROBLEMS_IN_FLIGHT` problems at a time.

        Raises ServiceError when the server fails, after everything that it had answered by then.
        """
        lines: asyncio.Queue[Trajectory | Failure | None] = asyncio.Queue(PROBLEMS_IN_FLIGHT)
        requests, errors = _batches(problems), list[Exception]()

        async def ask() -> None:
            try:
                while not errors and (batch := next(requests, None)):
                    async for line in self._answer(batch, asking):
                        await lines.put(line)
            except Exception as error:
                errors.append(error)
            await lines.put(None)

        askers = [asyncio.create_task(ask()) for _ in range(PROBLEMS_IN_FLIGHT // PROBLEMS_A_REQUEST)]
        try:
            running = len(askers)
            while running:
                line = await lines.get()
                if line is None:
                    running -= 1
                else:
                    yield line
        finally:
            for asker in askers:
                asker.cancel()
            await asyncio.gather(*askers, return_exceptions=True)
        if errors:
            raise errors[0]

    async def _answer(self, problems: list[Problem], asking: Asking) -> AsyncIterator[Trajectory | Failure]:
        """Stream one request; every trajectory asked for is answered once, or ServiceError is raised."""
        missing = {(problem.id, index) for problem in problems for index in range(asking.decoding.n)}
        headers = {"content-type": "application/json"}
        try:
            body = asking.request(problems)
            async with self._http.stream("POST", "/v1/trajectories", content=body, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise ServiceError(f"{self.server} refused the request: {_detail(response)}")
                async for text in response.aiter_lines():
                    if line := parse_line(text):
                        missing.remove((line.problem_id, line.sample_index))
                        yield line
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError) as error:
            raise ServiceError(f"{self.server} sent a line that is not of this protocol: {error!r}") from error
        if missing:
            raise ServiceError(f"{self.server} ended its answer with {len(missing)} trajectories missing")

    async def _ok(self, path: str) -> httpx.Response:
        response = await self._get(path)
        if response.status_code != 200:
            raise ServiceError(f"{self.server}{path} answered {response.status_code}: {_detail(response)}")
        return response

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._http.get(path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ServiceError:
        reason = str(error) or type(error).__name__
        return ServiceError(f"lost or cannot reach {self.server} ({reason}); is lightreasoner-server running there?")


def _batches(problems: Iterable[Problem]) -> Iterator[list[Problem]]:
    remaining = iter(problems)
    while batch := list(islice(remaining, PROBLEMS_A_REQUEST)):
        yield batch


def _detail(response: httpx.Response) -> str:
    """What an error response says, be it a problem document or not."""
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.text[:200]}"

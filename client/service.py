"""Async HTTP to a server: waits for it, asks what it serves, streams trajectories of many problems, submits jobs.

In: problems and how to answer them. Out: `Trajectory` and `Failure` values, as they complete, with a bounded
number of problems in flight. Whatever goes wrong with the server is a ServiceError that names it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx
from pydantic import ValidationError

from client.errors import ServiceError, Stopped, Unreachable
from client.protocol import (
    DEFAULT_TOP_K,
    SYSTEM_PROMPT,
    Decoding,
    Failure,
    Job,
    JobRequest,
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
SUBMIT_ATTEMPTS = 5
STOP_SECONDS = 2.0
"""How long `stop` waits for lines that are on their way."""
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

    def __init__(self, server: str, api_key: str | None = None) -> None:
        self.server = server.rstrip("/")
        self.stopping = False
        self._askers: list[asyncio.Task[None]] = []
        try:
            address = urlsplit(self.server)
            if address.scheme not in ("http", "https") or not address.hostname or address.port == 0:
                raise ValueError("expected http://host:port")
            limits = httpx.Limits(max_connections=PROBLEMS_IN_FLIGHT // PROBLEMS_A_REQUEST + 4)
            timeout = httpx.Timeout(READ_TIMEOUT_SECONDS, connect=10.0)
            self._http = httpx.AsyncClient(
                base_url=self.server, headers=_authorization(api_key), timeout=timeout, limits=limits
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ServiceError(f"--server {server!r} is no URL: {error}") from None

    def __str__(self) -> str:
        return self.server

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    def stop(self) -> None:
        """Ask for nothing more: `trajectories` ends after what the server has sent, within `STOP_SECONDS`."""
        self.stopping = True
        for asker in self._askers:
            asyncio.get_running_loop().call_later(STOP_SECONDS, asker.cancel)

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
            if self.stopping:
                raise Stopped(f"stopped waiting for {self.server}; nothing was asked of it yet")
            if time.monotonic() > deadline:
                raise ServiceError(f"{self.server} is still not ready after {READY_SECONDS:.0f} s: {reason}")
            if reason != told:
                tell(told := reason)
            await asyncio.sleep(READY_POLL_SECONDS)

    async def models(self) -> tuple[ModelCard, ModelCard]:
        """The expert's card and the amateur's."""
        content = (await self._ok("/v1/models")).content
        try:
            cards = {card.role: card for card in ModelList.model_validate_json(content).data}
            return cards["expert"], cards["amateur"]
        except (ValidationError, KeyError):
            raise ServiceError(f"{self.server} is no lightreasoner-server: its /v1/models lists no such pair") from None

    async def tokenizer(self) -> bytes:
        """The expert's tokenizer.json."""
        return (await self._ok("/v1/tokenizer")).content

    async def versions(self) -> dict[str, str]:
        """Versions of the server and of what its numbers rest on."""
        return (await self._ok("/version")).json()

    async def trajectories(self, problems: Iterable[Problem], asking: Asking) -> AsyncIterator[Trajectory | Failure]:
        """Every trajectory of `problems` as it completes; at most `PROBLEMS_IN_FLIGHT` problems at a time.

        Ends early after `stop`. Raises ServiceError when the server fails, after everything that it had answered.
        """
        lines: asyncio.Queue[Trajectory | Failure | None] = asyncio.Queue(PROBLEMS_IN_FLIGHT)
        requests, errors = _batches(problems), list[Exception]()

        async def ask() -> None:
            try:
                while not (errors or self.stopping) and (batch := next(requests, None)):
                    async with aclosing(self._answer(batch, asking)) as answer:
                        async for line in answer:
                            await lines.put(line)
                            if self.stopping:
                                break
            except Exception as error:
                errors.append(error)
            finally:
                await lines.put(None)

        askers = [asyncio.create_task(ask()) for _ in range(PROBLEMS_IN_FLIGHT // PROBLEMS_A_REQUEST)]
        self._askers = askers
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
            while not lines.empty():  # room for each asker's last word, so that none waits for a reader that is gone
                lines.get_nowait()
            await asyncio.gather(*askers, return_exceptions=True)
        if errors and not self.stopping:
            raise errors[0]

    async def submit(self, request: JobRequest) -> Job:
        """Post a job. Lost on the way, it is posted again under the same key, so that it is made once."""
        body, headers = request.model_dump_json(exclude_none=True), {"idempotency-key": uuid.uuid4().hex}
        for attempt in range(SUBMIT_ATTEMPTS):
            try:
                return self._job(await self._post("/v1/jobs", headers, body), 202)
            except Unreachable:
                if attempt == SUBMIT_ATTEMPTS - 1:
                    raise
            await asyncio.sleep(READY_POLL_SECONDS)
        raise AssertionError

    async def job(self, job_id: str) -> Job:
        """How far a job is, or how it ended."""
        return self._job(await self._get(f"/v1/jobs/{quote(job_id, safe='')}"), 200)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job."""
        return self._job(await self._post(f"/v1/jobs/{quote(job_id, safe='')}/cancel", {}, ""), 200)

    async def _answer(self, problems: list[Problem], asking: Asking) -> AsyncGenerator[Trajectory | Failure, None]:
        """Stream one request; every trajectory asked for is answered once, or ServiceError is raised."""
        missing = {(problem.id, index) for problem in problems for index in range(asking.decoding.n)}
        headers = {"content-type": "application/json"}
        try:
            body = asking.request(problems)
            async with self._http.stream("POST", "/v1/trajectories", content=body, headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise ServiceError(f"{self.server} refused the request: {_detail(response)}")
                async for text in _lines(response):
                    if line := parse_line(text):
                        missing.remove((line.problem_id, line.sample_index))
                        yield line
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ServiceError(f"{self.server} sent a line that is not of this protocol: {error!r}") from error
        if missing:
            raise ServiceError(f"{self.server} ended its answer with {len(missing)} trajectories missing")

    async def _ok(self, path: str) -> httpx.Response:
        response = await self._get(path)
        if response.status_code != 200:
            raise ServiceError(f"{self.server}{path} answered {response.status_code}: {_detail(response)}")
        return response

    def _job(self, response: httpx.Response, expected: int) -> Job:
        if response.status_code == 503:
            raise Unreachable(f"{self.server} cannot answer now: {_detail(response)}")
        if response.status_code != expected:
            raise ServiceError(f"{self.server} refused: {_detail(response)}")
        try:
            return Job.model_validate_json(response.content)
        except ValidationError:
            raise ServiceError(f"{self.server} sent no job of this protocol") from None

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._http.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def _post(self, path: str, headers: dict[str, str], body: str) -> httpx.Response:
        try:
            headers = {"content-type": "application/json", **headers}
            return await self._http.post(path, headers=headers, content=body.encode())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> Unreachable:
        reason = str(error) or type(error).__name__
        return Unreachable(f"lost or cannot reach {self.server} ({reason}); is lightreasoner-server running there?")


def _authorization(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key. Raises ServiceError, without the key, where no header can carry it."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ServiceError("--api-key: an API key has printable ASCII characters only")
    return {"authorization": f"Bearer {api_key}"}


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """NDJSON's lines, which end at a newline and nowhere else: JSON may hold other line separators as they are."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


def _batches(problems: Iterable[Problem]) -> Iterator[list[Problem]]:
    remaining = iter(problems)
    while batch := list(islice(remaining, PROBLEMS_A_REQUEST)):
        yield batch


def _detail(response: httpx.Response) -> str:
    """What an error response says, be it a problem document or not."""
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}, which is no answer of lightreasoner-server"

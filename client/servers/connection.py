"""HTTP to one server: whether it is ready, what it serves, the answer to one request, jobs.

In: requests of the contract. Out: the responses as values. Every error is a ServiceError that names the server; an
`Unreachable` may pass, others do not. It sends each request once, except a job's; `client.servers.dispatch` retries.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import re
import ssl
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import orjson
from pydantic import TypeAdapter, ValidationError

from client.errors import (
    Busy,
    LightReasonerError,
    ServiceError,
    TlsError,
    Unreachable,
    fault_words,
    shorten,
    shown,
)
from client.models.detokenize import MOST_TOKENIZER_BYTES, has_too_many_values
from client.protocol.requests import (
    Failure,
    Job,
    JobRequest,
    ModelList,
    PairCards,
    Problem,
    SamplingSettings,
    Trajectory,
    TrajectoryRequest,
    key_of_line,
    parse_line,
)
from client.protocol.trajectories import most_values
from client.retries import retry

VERSIONS = TypeAdapter(dict[str, str])
SUBMIT_ATTEMPTS, SUBMIT_PAUSE_SECONDS = 5, 1.0
READ_TIMEOUT_SECONDS = 60.0
"""A server that sends neither a line nor a heartbeat for this long counts as lost. Heartbeats come every 10 s."""
CONNECT_TIMEOUT_SECONDS = 10.0
MOST_ANSWER_LINE_BYTES = 2**28
"""Most bytes of a line: a trajectory of 100,000 tokens with a top k of 128 is smaller."""
SMALLEST_LINE_BOUND, BYTES_AN_ENTRY = 2**24, 64
"""Most bytes of a line: the first for its prompt, plus the second for each id of each top k, also in JSON."""
MOST_BODY_BYTES, MOST_CARDS_BYTES = 2**20, 2**22
"""Most bytes of a response that is not a stream."""
MOST_BODY_VALUES, MOST_CARDS_VALUES = 2**16, 2**18
"""Most JSON values of such a response, except a tokenizer: pydantic keeps a kilobyte for each invalid value. Cards may
name thousands of unknown tokens."""
ANSWER_SECONDS = 300.0
"""How long a response that is not a stream may take: enough for a tokenizer over a slow connection."""
LONGEST_RETRY_AFTER = 86_400.0
MOST_REASON_CHARACTERS = 500
"""Most characters of a server's words in a message."""
BEFORE_A_SERVER = (408, 429, 502, 504)
"""A proxy's statuses for /ready while no server is behind it, or while the server is overloaded."""
NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|record layer failure", re.IGNORECASE)
"""OpenSSL's errors if the other side does not speak TLS."""
WANTS_TLS = re.compile(rb"HTTPS (port|server)|SSL-enabled server port")
"""What nginx, Go's servers and Apache answer to a plain request if they expect TLS."""
BAD_LINE = "bad_line"
"""The type of failure that an invalid line becomes."""


class HttpAnswer(NamedTuple):
    """A whole response."""

    status: int
    headers: httpx.Headers
    content: bytes


class LineTooLong(Exception):
    """A line of a response is longer than `MOST_ANSWER_LINE_BYTES`."""


class Connection:
    """One server, by its URL. Creating it sends no request."""

    def __init__(self, server: str, api_key: str | None = None, host: str | None = None) -> None:
        """`host`: the server's name, if the URL has one of its addresses: TLS and proxies need the name."""
        self.server = server.rstrip("/")
        self.heard = -math.inf
        """When a request for trajectories last got a line or a heartbeat, on the clock of `time.monotonic`."""
        self._extensions = {"sni_hostname": host} if host else {}
        try:
            self._url = address = urlsplit(self.server)
            self._name = self.server.replace(f"{address.netloc.rpartition('@')[0]}@", "", 1)  # without a password
            if address.scheme in ("http+dns", "https+dns"):
                raise ValueError("this command asks one server; give http://name:port")
            if address.scheme not in ("http", "https") or not address.hostname or address.port == 0:
                raise ValueError("expected http://host:port")
            limits = httpx.Limits(max_connections=None)  # a server's window bounds its requests
            timeout = httpx.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS, pool=None)
            headers = _authorization(api_key) | {"accept-encoding": "identity"}
            if host:
                headers["host"] = host if address.port is None else f"{host}:{address.port}"
            from client.servers.transport import CTransport  # slow to import

            # httpx's own transport is slower, but supports proxies.
            names = [host or address.hostname, address.hostname]
            bypassed = any(proxy_bypass(name if address.port is None else f"{name}:{address.port}") for name in names)
            transport = CTransport() if bypassed or not set(getproxies()) - {"no"} else None
            self._http = httpx.AsyncClient(
                base_url=self.server, headers=headers, timeout=timeout, limits=limits, transport=transport
            )
        except (httpx.InvalidURL, ValueError) as error:
            raise ServiceError(f"--server {server!r} is not a valid URL: {error}") from None
        except OSError as error:
            raise ServiceError(f"certificates cannot be loaded: {error}; see SSL_CERT_FILE and SSL_CERT_DIR") from error

    def __str__(self) -> str:
        return self._name

    async def aclose(self) -> None:
        await self._http.aclose()

    async def why_not_ready(self) -> str | None:
        """Why a server is not ready yet; None if it is ready.

        Raises ServiceError if the server cannot be reached, or has failed.
        """
        answer = await self._get("/ready")
        if answer.status == 200:
            return None
        starting = answer.status == 503 and "retry-after" in answer.headers
        if answer.status == 400 and self._url.scheme == "http" and WANTS_TLS.search(answer.content):
            raise self._other_scheme()
        if not starting and answer.status not in BEFORE_A_SERVER:
            raise ServiceError(f"{self} cannot serve: {_detail(answer)}")
        return _detail(answer)

    async def models(self) -> PairCards:
        """The expert's card and the amateur's."""
        content = self._few(await self._ok("/v1/models", MOST_CARDS_BYTES), MOST_CARDS_VALUES)
        try:
            cards = {card.role: card for card in ModelList.model_validate_json(content).data}
            pair = PairCards(cards["expert"], cards["amateur"])
        except (ValidationError, KeyError) as error:
            reason = f"no card of the {error.args[0]}" if isinstance(error, KeyError) else _first_fault(error)
            raise ServiceError(
                f"{self} is not a lightreasoner-server: its /v1/models lists no pair ({reason})"
            ) from None
        for card in pair:  # a card allows 0, for an imported RUN's unknown amateur
            for field in ("vocab_size", "max_model_len"):
                if getattr(card, field) < 1:
                    raise ServiceError(
                        f"{self} is not a lightreasoner-server: its /v1/models lists no pair ({card.role} {field}: 0)"
                    )
        return pair

    async def tokenizer(self) -> bytes:
        """The expert's tokenizer.json."""
        content = await self._ok("/v1/tokenizer", MOST_TOKENIZER_BYTES)
        if not has_too_many_values(content):
            with contextlib.suppress(ValueError):
                if isinstance(found := orjson.loads(content), dict) and "model" in found:
                    return content
        raise ServiceError(f"{self} is not a lightreasoner-server: its /v1/tokenizer is not a tokenizer.json")

    async def versions(self) -> dict[str, str]:
        """Versions of the server and of the packages that its results depend on."""
        try:
            return VERSIONS.validate_json(self._few(await self._ok("/version")))
        except ValidationError:
            raise ServiceError(f"{self} is not a lightreasoner-server: its /version lists no versions") from None

    async def answer(
        self, problems: list[Problem], sampling: SamplingSettings, vocab_size: int
    ) -> AsyncGenerator[Trajectory | Failure, None]:
        """Send one request, and yield each requested trajectory once. If some are missing, raises Unreachable.

        An invalid line is a Failure of its trajectory alone, if its key can be read. `vocab_size`: columns of the
        expert's head.
        """
        missing = {(problem.id, index) for problem in problems for index in range(sampling.n)}
        headers, body = {"content-type": "application/json"}, _body(problems, sampling)
        longest = {problem.id: len(problem.token_ids or ()) or sampling.max_tokens for problem in problems}
        most = min(
            SMALLEST_LINE_BOUND + BYTES_AN_ENTRY * sampling.top_k * max(longest.values()), MOST_ANSWER_LINE_BYTES
        )
        try:
            async with self._stream("POST", "/v1/trajectories", headers, body) as response:
                if response.status_code != 200:
                    raise self._refusal(await self._whole(response), f"{self} rejected the request")
                self._check_encoding(response)
                async for text in _ndjson_lines(response, most):
                    self.heard = time.monotonic()
                    if line := self._read(text, sampling.top_k, vocab_size, longest):
                        key = line.problem_id, line.sample_index
                        if key not in missing:
                            raise ServiceError(f"{self} answered {key!r:.200}, which was not requested, or came twice")
                        missing.remove(key)
                        yield line
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except LineTooLong as error:
            raise ServiceError(f"{self} sent {error}") from None
        if missing:
            raise Unreachable(f"{self} ended its response with {len(missing)} trajectories missing")

    async def submit(self, request: JobRequest) -> Job:
        """Submit a job. Retries send the same idempotency key, so that only one job is created."""
        said = request.model_copy(update={"system_prompt": request.system_prompt or ""})  # null would be left out
        body = said.model_dump_json(exclude_none=True, exclude=request.unsaid)
        headers = {"idempotency-key": uuid.uuid4().hex}

        async def post() -> Job:
            return self._job(await self._post("/v1/jobs", headers, body), 202)

        return await retry(
            post,
            may_pass=lambda error: isinstance(error, Unreachable) and error.may_pass,
            pause=SUBMIT_PAUSE_SECONDS,
            attempts=SUBMIT_ATTEMPTS,
        )

    async def job(self, job_id: str) -> Job:
        """A job's status."""
        return self._job(await self._get(f"/v1/jobs/{quote(job_id, safe='')}"), 200)

    async def cancel(self, job_id: str) -> Job:
        """Cancel a job."""
        return self._job(await self._post(f"/v1/jobs/{quote(job_id, safe='')}/cancel", {}, ""), 200)

    def _read(self, text: bytes, top_k: int, vocab_size: int, longest: dict[str, int]) -> Trajectory | Failure | None:
        """The value of a line; a Failure for an invalid line. Raises ServiceError if its key cannot be read."""
        try:
            line = parse_line(text, vocab_size)
            if isinstance(line, Trajectory) and (k := line.top_ids.shape[1]) != top_k:
                raise ValueError(f"its top k is {k}, expected {top_k}")
            if isinstance(line, Trajectory) and (tokens := len(line.token_ids)) > longest.get(line.problem_id, tokens):
                raise ValueError(
                    f"it has {tokens} tokens, more than the {longest[line.problem_id]} that were requested"
                )
            return line
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            fault = f"{self} sent an invalid line: {error!r:.300}"
            if (key := key_of_line(text)) is None:
                raise ServiceError(fault) from error
            return Failure(*key, BAD_LINE, fault)

    def _refusal(self, answer: HttpAnswer, what: str) -> ServiceError:
        """Convert an error response to an exception of the right kind."""
        said = f"{what}: {_detail(answer)}"
        if answer.status == 401:
            said += " (--api-key or LIGHTREASONER_API_KEY gives one)"
        if answer.status == 429:
            return Busy(said, _retry_after(answer))
        if answer.status == 408 or answer.status >= 500:
            return Unreachable(said, _retry_after(answer))
        return ServiceError(said)

    async def _ok(self, path: str, most: int = MOST_BODY_BYTES) -> bytes:
        answer = await self._get(path, most)
        if answer.status != 200:
            raise self._refusal(answer, f"{self}{path} answered {answer.status}")
        return answer.content

    def _few(self, content: bytes, most: int = MOST_BODY_VALUES) -> bytes:
        """The same body. Raises ServiceError if it holds too many values to check."""
        if (count := most_values(content)) > most:
            raise ServiceError(f"{self} answered with {count:,} values; is a lightreasoner-server there?")
        return content

    def _job(self, answer: HttpAnswer, expected: int) -> Job:
        if answer.status == 503:
            raise Unreachable(f"{self} cannot answer now: {_detail(answer)}", _retry_after(answer))
        if answer.status != expected:
            raise ServiceError(f"{self} rejected the request: {_detail(answer)}")
        try:
            return Job.model_validate_json(self._few(answer.content))
        except ValidationError:
            raise ServiceError(f"{self} sent an invalid job") from None

    def _stream(
        self, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> AbstractAsyncContextManager[httpx.Response]:
        return self._http.stream(method, path, headers=headers, content=body, extensions=self._extensions)

    async def _get(self, path: str, most: int = MOST_BODY_BYTES) -> HttpAnswer:
        return await self._answer("GET", path, {}, b"", most)

    async def _post(self, path: str, headers: dict[str, str], body: str) -> HttpAnswer:
        headers = {"content-type": "application/json", **headers}
        return await self._answer("POST", path, headers, body.encode(), MOST_BODY_BYTES)

    async def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes, most: int) -> HttpAnswer:
        try:
            async with (
                asyncio.timeout(ANSWER_SECONDS),
                self._stream(method, path, headers, body) as response,
            ):
                return await self._whole(response, most)
        except TimeoutError:
            raise Unreachable(f"{self}{path} was not answered whole in {ANSWER_SECONDS:g} s") from None
        except httpx.HTTPError as error:
            raise await self._tls_is_there(error) or self._unreachable(error) from error

    async def _tls_is_there(self, error: httpx.HTTPError) -> TlsError | None:
        """A TlsError if the server ended a plain connection because it expects TLS; else None."""
        if self._url.scheme != "http" or not isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
            return None
        anybody = ssl.create_default_context()
        anybody.check_hostname, anybody.verify_mode = False, ssl.CERT_NONE
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_SECONDS):
                _, writer = await asyncio.open_connection(self._url.hostname, self._url.port or 80, ssl=anybody)
        except (OSError, TimeoutError):
            return None
        writer.close()
        return self._other_scheme()

    def _other_scheme(self) -> TlsError:
        other, speaks = ("http", "plain HTTP") if self._url.scheme == "https" else ("https", "HTTP with TLS")
        return TlsError(f"{self} speaks {speaks}; give {other}{self._name.removeprefix(self._url.scheme)}")

    async def _whole(self, response: httpx.Response, most: int = MOST_BODY_BYTES) -> HttpAnswer:
        """A response with its body, of at most `most` bytes. Raises ServiceError for a larger one."""
        self._check_encoding(response)
        content = bytearray()
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) > most:
                raise ServiceError(f"{self} answered with more than {most:,} bytes; is a lightreasoner-server there?")
        return HttpAnswer(response.status_code, response.headers, bytes(content))

    def _check_encoding(self, response: httpx.Response) -> None:
        """Raises ServiceError for a compressed response. The client asks for none: a few bytes may become gigabytes."""
        if (encoding := response.headers.get("content-encoding", "identity").strip().lower()) != "identity":
            raise ServiceError(
                f"{self} answered in Content-Encoding {shown(encoding)}, though it was asked for none; turn off "
                "the compression of its proxy"
            )

    def _unreachable(self, error: Exception) -> Unreachable:
        reason = shorten(str(error), MOST_REASON_CHARACTERS) or type(error).__name__
        if NO_TLS.search(reason):
            return self._other_scheme()
        if "CERTIFICATE_VERIFY_FAILED" in reason:
            return TlsError(
                f"cannot reach {self} ({reason}); correct the URL or the certificate. To trust one of your own, name "
                "its file in SSL_CERT_FILE"
            )
        return Unreachable(f"cannot reach {self} ({reason}); is lightreasoner-server running there?")


def _body(problems: list[Problem], sampling: SamplingSettings) -> bytes:
    """The body of POST /v1/trajectories. Raises LightReasonerError if the problems do not make a valid request."""
    try:
        request = TrajectoryRequest(**dict(sampling), problems=problems, encoding="base64")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise LightReasonerError(f"invalid request: {where + ': ' if where else ''}{fault_words(first)}") from None
    return request.model_dump_json(exclude=request.unsaid).encode()


def _authorization(api_key: str | None) -> dict[str, str]:
    """The header with the API key. Raises ServiceError, without showing the key, if it cannot be in a header."""
    if not api_key:
        return {}
    if not (api_key.isascii() and api_key.isprintable()):
        raise ServiceError("--api-key: an API key has printable ASCII characters only")
    return {"authorization": f"Bearer {api_key}"}


async def _ndjson_lines(response: httpx.Response, most: int) -> AsyncIterator[bytes]:
    """The lines of NDJSON. A line ends only at a newline: JSON may contain other line separators.

    The text after the last newline is a line too if it is complete JSON; otherwise the stream was cut.
    """
    pieces: list[bytes] = []  # of the current line; joined once, because it may be large
    size = 0
    async for chunk in response.aiter_raw():
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        if (size := size + len(first)) > most:
            raise LineTooLong(f"a line of more than {most:,} bytes")
        if others:
            yield b"".join(pieces)
            for line in others[:-1]:
                yield line
            pieces, size = [others[-1]], len(others[-1])
    if (rest := b"".join(pieces)) and _is_json(rest):
        yield rest


def _is_json(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def _first_fault(error: ValidationError) -> str:
    first = error.errors(include_input=False)[0]
    return shorten(f"{'.'.join(map(str, first['loc']))}: {fault_words(first)}", MOST_REASON_CHARACTERS)


def _retry_after(answer: HttpAnswer) -> float:
    """Seconds from Retry-After, in either of its forms, a day at most; 0 if it is missing or invalid."""
    value = answer.headers.get("retry-after", "")
    try:
        if value.isascii() and value.isdigit():
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, LookupError, ArithmeticError):  # parsing a date may raise any of these
        return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)


def _detail(answer: HttpAnswer) -> str:
    """The text of an error response, whether it is a problem document or not."""
    try:
        return shorten(str(orjson.loads(answer.content)["detail"]), MOST_REASON_CHARACTERS)
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"HTTP {answer.status}, which is not a response of lightreasoner-server"

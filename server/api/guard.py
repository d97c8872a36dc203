"""Checks every request before a route sees it: API key, body size, whether the server is stopping; gives it an id.

An ASGI layer, so that no body is read or parsed before its sender is known and its size is within the limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import itertools
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from ipaddress import ip_address
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import logs, metrics
from server.api.connections import REQUEST_HEAD_BYTES, head_too_large
from server.api.problem_details import problem_response
from server.settings import API_KEYS_VARIABLE, ServerLimits, ServerSettings, SettingsError

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Paths that need no key: they only tell whether the service works."""
QUIET_PATHS = OPEN_PATHS | {"/metrics"}
"""Paths that machines request every few seconds. They are not logged."""
NAMED_KEY = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63}):\s+(.*)")
SHORTEST_KEY, SHORTEST_LOCAL_KEY = 8, 4
"""Least characters of a key, beyond loopback and on it. A shorter key can be guessed."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_LEFT = 499
"""Status that is counted when the client disconnects before the end of its answer, as in nginx."""
MOST_DIGITS = 18
"""Most digits of a Content-Length."""
BODY_SECONDS = 60.0
"""A whole body must arrive within this time."""

BODIES_RETRY_SECONDS = 5

access = logging.getLogger("lightreasoner.access")


class ApiKeys:
    """The valid API keys, each with a name. Compared in constant time, never logged or shown."""

    def __init__(self, keys: list[str]) -> None:
        """`keys`: each as KEY, or as NAME: KEY. Keys with the same name count as one."""
        named = [_name_and_key(key) for key in keys]
        self._digests = [(name, hashlib.sha256(key.encode()).digest()) for name, key in named]
        self.names = {name for name, _ in named}

    def __bool__(self) -> bool:
        return bool(self._digests)

    def name_of(self, authorization: str) -> str | None:
        """The name of the key in an Authorization header; None if the key is not valid."""
        scheme, _, given = authorization.partition(" ")
        digest = hashlib.sha256(given.strip().encode()).digest()
        matches = [name for name, mine in self._digests if hmac.compare_digest(digest, mine)]
        return matches[0] if matches and scheme.lower() == "bearer" else None


def _name_and_key(entry: str) -> tuple[str, str]:
    """Name and key. A key without a name is named by its digest: the same each time, and does not reveal the key."""
    if named := NAMED_KEY.fullmatch(entry):
        return named[1], named[2]
    return f"key-{hashlib.sha256(f'lightreasoner key {entry}'.encode()).hexdigest()[:12]}", entry


def load_keys(settings: ServerSettings) -> ApiKeys:
    """The keys from file and environment. Raises SettingsError if a key is required and none is given."""
    keys = [key.strip() for key in os.environ.get(API_KEYS_VARIABLE, "").split(",") if key.strip()]
    if settings.api_key_file:
        try:
            lines = settings.api_key_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"api_key_file {settings.api_key_file} cannot be read: {error}") from None
        listed = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not listed:
            raise SettingsError(f"api_key_file {settings.api_key_file} holds no key; write one a line")
        keys += listed
    secrets_alone = [_name_and_key(key)[1] for key in keys]
    if any(not key.isascii() or len(key.split()) != 1 for key in secrets_alone):
        raise SettingsError("an API key may hold neither spaces nor non-ASCII letters: it is sent in a header")
    shortest = SHORTEST_LOCAL_KEY if _is_loopback(settings.host) else SHORTEST_KEY
    if any(len(key) < shortest for key in secrets_alone):
        raise SettingsError(
            f"an API key is shorter than {shortest} characters and can be guessed; 'openssl rand -hex 32' makes one"
        )
    if not keys and not _is_loopback(settings.host):
        raise SettingsError(
            f"--host {settings.host} can be reached from other machines, so an API key is needed: give --api-key-file"
            f" FILE (one key a line) or set {API_KEYS_VARIABLE}; 'openssl rand -hex 32' makes one"
        )
    return ApiKeys(keys)


class Bodies:
    """Counts the bytes of all requests' bodies, from their arrival to the end of their responses, and bounds them."""

    def __init__(self, most: int) -> None:
        self.most, self.bytes = most, 0

    def take(self, size: int) -> None:
        """Count bytes that have arrived. Answers 503 if there is no room for them."""
        if self.bytes + size > self.most:
            raise HTTPException(
                503,
                f"the server holds {self.bytes:,} bytes of requests, and takes at most {self.most:,}; retry",
                {"Retry-After": str(BODIES_RETRY_SECONDS)},
            )
        self.bytes += size


class Body:
    """A request's body as it arrives. It is rejected if it is longer than `most` bytes, or too slow."""

    def __init__(self, receive: Receive, most: int, headers: Headers, bodies: Bodies) -> None:
        self._receive, self._most, self._bodies = receive, most, bodies
        self.seen = 0
        """Bytes that have arrived, which `Bodies` counts too."""
        self._sent = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        self._deadline = time.monotonic() + BODY_SECONDS
        self._whole = False
        self.answered = False
        """Whether the whole response was sent."""
        self.abandoned = False
        """Whether the client disconnected before its body or its response was complete."""

    @property
    def unread(self) -> bool:
        """Whether the client may still be sending it."""
        return self._sent and not self._whole

    async def receive(self) -> Message:
        if self._whole:  # the only message left is the disconnect
            message = await self._receive()
            self.abandoned = message["type"] == "http.disconnect" and not self.answered
            return message
        try:
            async with asyncio.timeout(self._deadline - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY_SECONDS:.0f} s") from None
        self.abandoned = message["type"] == "http.disconnect"
        size = len(message.get("body", b""))
        if self.seen + size > self._most:
            raise HTTPException(413, _too_large(self._most))
        self._bodies.take(size)
        self.seen += size
        self._whole = not message.get("more_body", False)
        return message


class Guard:
    """Wraps the application. `draining()` is true while the server stops and rejects new work."""

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys,
        body_bytes: int,
        draining: Callable[[], bool],
        all_bodies_bytes: int = ServerLimits().all_bodies_bytes,
    ) -> None:
        self._app, self._keys, self._body_bytes, self._draining = app, keys, body_bytes, draining
        self._bodies = Bodies(all_bodies_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, headers = time.perf_counter(), 500, Headers(scope=scope)
        body = Body(receive, self._body_bytes, headers, self._bodies)
        request_id = headers.get("x-request-id", "")
        if not (request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= 128):
            request_id = secrets.token_hex(8)
        logs.request_id.set(request_id)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = request_id
                if body.unread:
                    answered["connection"] = "close"
            body.answered = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            if refusal := self._refusal(scope, headers):
                await refusal(scope, receive, sending)
            else:
                await self._app(scope, body.receive, sending)
        except asyncio.CancelledError:
            status = CLIENT_LEFT
            raise
        except ClientDisconnect:  # the client has left, or was disconnected: nothing is wrong here
            body.abandoned = True
        finally:
            self._bodies.bytes -= body.seen
            self._record(scope, CLIENT_LEFT if body.abandoned else status, time.perf_counter() - began)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The response to a request that is rejected before any route; else None."""
        path = scope["path"]
        head = (
            len(scope.get("raw_path", b""))
            + len(scope.get("query_string", b""))
            + sum(map(len, itertools.chain(*headers.raw)))
        )
        if head > REQUEST_HEAD_BYTES:
            return problem_response(431, head_too_large())
        given = headers.get("authorization", "")
        scope["key_name"] = self._keys.name_of(given)
        if self._keys and path not in OPEN_PATHS and scope["key_name"] is None:
            needed = "an API key is needed, as 'Authorization: Bearer KEY'"
            said = f"{needed}; this one is not valid here" if given else needed
            return problem_response(401, said, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0").lstrip("0")
        if length and (len(length) > MOST_DIGITS or not length.isdecimal() or int(length) > self._body_bytes):
            return problem_response(413, _too_large(self._body_bytes))
        if scope["method"] == "POST" and self._draining():
            return problem_response(503, "the server is stopping; use another server", {"Retry-After": "5"})
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        route = scope.get("route")
        # Only known label values: the route's pattern instead of the path, and no invented methods.
        path = getattr(route, "path", "unknown")
        method = scope["method"] if scope["method"] in METHODS else "unknown"
        metrics.HTTP_REQUESTS.labels(method, path, status).inc()
        metrics.HTTP_SECONDS.labels(method, path).observe(seconds)
        if scope["path"] not in QUIET_PATHS:
            method, path = quote(scope["method"]), quote(scope["path"])  # from outside: control characters are escaped
            extra = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4)}
            access.info("%s %s %d %.2f s", method, path, status, seconds, extra=extra)


def _too_large(most: int) -> str:
    return f"a body may have at most {most:,} bytes; send fewer problems a request"


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Bounds what a connection may send, hold and wait for before its request is known: HTTP/1.1 as h11 parses it.

In: bytes from unknown clients. Out: requests for the application, or a problem document and the connection's end. It
never looks at the content of a request: `server.api.guard` does.

In each turn the event loop reads only a small piece of a connection, so that no connection blocks the others. Bytes
that are not read yet stay with their sender.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from server.api.problem_details import problem_response

PIECE_BYTES = 8 * 1024
"""Most bytes read from a connection in one turn of the event loop. In chunks of one byte they take some 20 ms to
parse."""
REQUEST_HEAD_BYTES = 16 * 1024
"""Most bytes of a request's line and headers, of a chunk's header, of trailers."""
HEAD_SECONDS = 30.0
"""Longest time from a connection's start to the end of its first request's head."""
KEEP_ALIVE_SECONDS = 75
"""Longest time from a response to the end of the next request's head. Clients and load balancers close idle connections
earlier, so that the server need not."""
LINGER_SECONDS = 5.0
"""How long a client that is still sending may read its response. Its bytes are dropped."""
MOST_CONNECTIONS = 4096
SPARE_FILES = 512
"""Open files reserved for the engines, the bucket and the log."""


def allow_connections() -> int:
    """Raise the process's limit of open files as far as allowed; returns how many connections fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else max(1, min(MOST_CONNECTIONS, soft - SPARE_FILES))


def head_too_large() -> str:
    return f"a request's line and headers may have at most {REQUEST_HEAD_BYTES:,} bytes"


class PacedTransport:
    """A transport that pauses for a turn after each piece.

    If it is closed while the peer is still sending, the peer can still read its response.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._wanted, self._resting = True, False
        self.peer_sends = False
        """Whether the peer is still sending a body."""
        self.lingering = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def pause_reading(self) -> None:
        self._wanted = False
        self._apply()

    def resume_reading(self) -> None:
        self._wanted = True
        self._apply()

    def rest(self) -> None:
        """Read no more in this turn of the event loop."""
        self._resting = True
        self._apply()
        self._loop.call_soon(self._rested)

    def is_closing(self) -> bool:
        return self.lingering or self._transport.is_closing()

    def close(self) -> None:
        if self.lingering or not self.peer_sends or self._transport.is_closing():
            self._transport.close()
            return
        # Closing at once would reset the connection, and the peer would lose the response.
        self.lingering = True
        self._transport.write_eof()
        self._loop.call_later(LINGER_SECONDS, self._transport.abort)
        self.resume_reading()

    def _rested(self) -> None:
        self._resting = False
        self._apply()

    def _apply(self) -> None:
        if not self._transport.is_closing():
            (self._transport.resume_reading if self._wanted and not self._resting else self._transport.pause_reading)()


class BoundedRequests(H11Protocol):
    """uvicorn's protocol for one connection, with a time limit for each head, and errors as problem documents."""

    _due: asyncio.TimerHandle | None = None
    _since = 0.0

    def __init__(self, most_connections: int, *given: Any) -> None:
        super().__init__(*given)
        self._most_connections = most_connections

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head(HEAD_SECONDS)
        if len(self.connections) > self._most_connections:
            waiting = [other for other in self.connections if isinstance(other, BoundedRequests) and other._due]
            oldest = min(waiting, key=lambda other: other._since)
            if oldest is self:
                self.refuse(503, "too many connections are open; retry", {"Retry-After": "5"})
            else:
                oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        self._note_peer()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        self._await_head(KEEP_ALIVE_SECONDS)
        super().on_response_complete()

    def _should_upgrade(self) -> bool:
        return False  # nor warn of it: clients could fill the log

    def send_400_response(self, msg: str) -> None:
        """Called if the bytes are not a valid HTTP request."""
        error = sys.exc_info()[1]
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            self.refuse(431, head_too_large())
        else:
            self.refuse(400, f"not a valid HTTP/1.1 request: {error or msg}"[:REQUEST_HEAD_BYTES])

    def refuse(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        """Answer bytes that are not a request, or a request whose rest cannot be read, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = problem_response(status, detail, {"Connection": "close", **(headers or {})})
            response = h11.Response(status_code=status, headers=answer.raw_headers)
            for event in (response, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                if sent := self.conn.send(event):
                    self.transport.write(sent)
        if self.cycle is not None and not self.cycle.response_complete:  # the application waits for the body's rest
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._stop_waiting()
        self.transport.peer_sends = True  # type: ignore[attr-defined]
        self.transport.close()

    def _await_head(self, seconds: float) -> None:
        self._stop_waiting()
        self._since = self.loop.time()
        self._due = self.loop.call_later(seconds, self._waited, seconds)

    def _stop_waiting(self) -> None:
        if self._due:
            self._due.cancel()
            self._due = None

    def _waited(self, seconds: float) -> None:
        self._due = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            self.refuse(408, f"the request's head did not arrive within {seconds:g} s")
        else:
            self.transport.close()

    def _note_peer(self) -> None:
        self.transport.peer_sends = self.conn.their_state is h11.SEND_BODY  # type: ignore[attr-defined]


class BoundedConnection(asyncio.BufferedProtocol):
    """The event loop's protocol: it reads into one small buffer, whose bytes go to `requests`."""

    _buffer = bytearray(PIECE_BYTES)  # of all connections: its bytes are copied before the next read

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        most_connections: int = MOST_CONNECTIONS,
    ) -> None:
        self.requests = BoundedRequests(most_connections, config, server_state, app_state, _loop)

    def connection_made(self, transport: Any) -> None:
        self._transport = PacedTransport(transport, self.requests.loop)
        self.requests.connection_made(self._transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.requests.connection_lost(exc)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self._transport.is_closing():
            self.requests.data_received(bytes(self._buffer[:nbytes]))
        self._transport.rest()

    def pause_writing(self) -> None:
        self.requests.pause_writing()

    def resume_writing(self) -> None:
        self.requests.resume_writing()

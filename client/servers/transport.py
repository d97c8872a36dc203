"""An HTTP/1.1 transport for httpx with aiohttp, whose parser is in C: httpx's own takes half of the client's time.

In: httpx's requests. Out: httpx's responses, whose bodies are streamed and never decompressed; errors are httpx's. No
redirects, cookies or proxies. A GET is sent again if the server has just closed an idle connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Callable, Iterator

import aiohttp
import httpx
from aiohttp.resolver import ThreadedResolver

LONGEST_HEADER_BYTES = 2**16


class CTransport(httpx.AsyncBaseTransport):
    """Connections to any number of servers; idle ones are reused. Creating it needs no event loop."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._forget: Callable[[], None] = lambda: None
        self._tls = httpx.create_ssl_context()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self._session is None or self._loop is not asyncio.get_running_loop():
            self._forget()
            self._session, self._loop = self._new_session(), asyncio.get_running_loop()
            # Not __del__: aiohttp's objects may be finalised first, and would complain on the terminal.
            self._forget = weakref.finalize(self, _close_what_was_left_open, self._session)
        timeout = request.extensions["timeout"]
        # aiohttp has no timeout for a server that does not read the body.
        head = sum(timeout[part] for part in ("connect", "write", "read"))
        with _httpx_errors():
            async with asyncio.timeout(head):
                response = await self._session.request(
                    request.method,
                    str(request.url.copy_with(userinfo=b"")),
                    headers=request.headers.multi_items(),
                    data=await request.aread() or None,
                    allow_redirects=False,
                    timeout=aiohttp.ClientTimeout(connect=timeout["connect"], sock_read=timeout["read"]),
                    server_hostname=request.extensions.get("sni_hostname"),
                )
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response))

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _new_session(self) -> aiohttp.ClientSession:
        # As httpx does: the system resolves names, anew for each connection.
        connector = aiohttp.TCPConnector(
            limit=0, ssl=self._tls, keepalive_timeout=5.0, resolver=ThreadedResolver(), use_dns_cache=False
        )
        return aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            max_line_size=LONGEST_HEADER_BYTES,
            max_field_size=LONGEST_HEADER_BYTES,
        )


class _Body(httpx.AsyncByteStream):
    """The body of a response."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _httpx_errors():
            async for chunk in self._response.content.iter_any():
                yield chunk

    async def aclose(self) -> None:
        self._response.close()  # a connection whose response was read whole has been released before


def _close_what_was_left_open(session: aiohttp.ClientSession) -> None:
    if connector := session.connector:
        session.detach()
        connector._close()  # the public method must be awaited, and its loop may have ended


@contextlib.contextmanager
def _httpx_errors() -> Iterator[None]:
    """Convert aiohttp's errors to httpx's, with the reason alone as message."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise httpx.ConnectTimeout(str(error)) from error
    except TimeoutError as error:
        raise httpx.ReadTimeout(str(error)) from error
    except aiohttp.ClientConnectorCertificateError as error:
        raise httpx.ConnectError(str(error.certificate_error)) from error
    except aiohttp.ClientConnectorError as error:
        raise httpx.ConnectError(str(error.os_error)) from error
    except aiohttp.ClientOSError as error:
        raise httpx.ReadError(str(error)) from error
    except aiohttp.ClientResponseError as error:
        raise httpx.RemoteProtocolError(error.message) from error
    except aiohttp.ClientError as error:
        raise httpx.RemoteProtocolError(str(error)) from error

"""A TCP proxy in front of a server. It cuts connections, refuses them, or reports the data that passes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial

Hear = Callable[[bool, bytes], None]
"""Gets each piece of data, and True if it goes to the server, False if it comes from the server."""


class Proxy:
    """`cut_after`: bytes that the server may send on a connection before it is reset, even in the middle of a line.

    `listener` is called for each connection. The function that it returns gets all data, in both directions, before the
    proxy passes it on.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.url = ""
        self.cut_after: int | None = None
        self.refusing = False
        self.listener: Callable[[], Hear] | None = None
        self.connections = self.cuts = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def cut(self) -> None:
        """Reset every open connection."""
        assert self._loop
        self._loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self._open])

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        """Pass connections on from a thread until the end of the block."""
        started = threading.Event()

        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._done = asyncio.Event()
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()
            await self._done.wait()
            server.close()
            for writer in self._open:
                writer.transport.abort()

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        started.wait()
        try:
            yield self
        finally:
            assert self._loop
            self._loop.call_soon_threadsafe(self._done.set)
            thread.join(10)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.refusing:
            writer.transport.abort()
            return
        self._open.add(writer)
        try:
            to, back = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        hear = self.listener() if self.listener else lambda asked, data: None
        sending = asyncio.create_task(self._pass(reader, back, None, partial(hear, True)))
        try:
            await self._pass(to, writer, self.cut_after, partial(hear, False))
        finally:
            sending.cancel()
            for end in (writer, back):
                end.transport.abort()
            self._open.discard(writer)

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        most: int | None,
        hear: Callable[[bytes], None],
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(4096 if most is None else min(4096, most)):
                hear(data)
                writer.write(data)
                await writer.drain()
                if most is not None and (most := most - len(data)) <= 0:
                    self.cuts += 1
                    return

"""Lets servers join and leave a call as the addresses behind DNS names change.

In: names, the servers that are given by URL, a call. Out: a server joins the call once a name leads to it and it is
ready with the same pair; it gets no more requests once no name leads to it. A failed lookup changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from client.errors import ServiceError, TlsError, Unreachable
from client.protocol.requests import PairCards
from client.servers.connection import Connection
from client.servers.dispatch import Dispatch
from client.servers.names import ServerName
from client.servers.window import ServerWindow, pair_differences

NAME_POLL_SECONDS = 5.0
"""How often names are looked up again."""
NEW_SERVER_SECONDS = 5.0
"""How long a new server has to answer."""


class Following:
    """Follows the names of one call. `pairs`: the cards of each known server; servers that join are added."""

    def __init__(
        self,
        names: Sequence[ServerName],
        others: Sequence[Connection],
        pairs: dict[Connection, PairCards],
        call: Dispatch,
        tell: Callable[[str], None],
    ) -> None:
        self._names, self._others, self._pairs, self._call, self._tell = names, others, pairs, call, tell
        self._pair = next(iter(pairs.values()))
        self._said: dict[object, str] = {}  # the last problem that was reported of each name or server

    async def run(self) -> None:
        """Follow the names until this task is cancelled."""
        while self._names:
            for name in self._names:
                try:
                    await name.read()
                except Unreachable as error:
                    self._say(name, str(error))
                else:
                    self._said.pop(name, None)
            behind = [server for name in self._names for server in name.connections.values()]
            self._part_with_the_gone({*behind, *self._others})
            has = {server.connection for server in self._call.servers} | self._call.dropped
            await asyncio.gather(*(self._join(server) for server in behind if server not in has))
            await asyncio.sleep(NAME_POLL_SECONDS)

    def _part_with_the_gone(self, there: set[Connection]) -> None:
        self._call.dropped &= there  # a server that comes back may work again
        for server in list(self._call.servers):
            if server.connection not in there and not server.leaving:
                self._call.part_with(server)
                self._tell(f"{server.connection} has left")

    async def _join(self, server: Connection) -> None:
        pair = await pair_if_ready(server)
        if isinstance(pair, ServiceError):
            return self._say(server, str(pair))
        if different := pair_differences(self._pair, pair):
            return self._say(server, f"{server} serves another pair, and gets no problems: {'; '.join(different)}")
        self._said.pop(server, None)
        self._pairs[server] = pair
        self._call.join(ServerWindow(server, pair))
        self._tell(f"{server} has joined")

    def _say(self, about: object, reason: str) -> None:
        self._call.nobody = reason
        if self._said.get(about) != reason:
            self._said[about] = reason
            self._tell(reason)


async def pair_if_ready(server: Connection) -> PairCards | ServiceError:
    """The pair of a server that is ready now, or the reason why it is not: an Unreachable if that may pass."""
    try:
        async with asyncio.timeout(NEW_SERVER_SECONDS):
            try:
                reason = await server.why_not_ready()
            except ServiceError as error:  # a failed server may be restarted
                return error if isinstance(error, TlsError) else Unreachable(str(error))
            return Unreachable(f"{server} is not ready: {reason}") if reason else await server.models()
    except TimeoutError:
        return Unreachable(f"{server} is not ready: it does not respond")
    except ServiceError as error:
        return error

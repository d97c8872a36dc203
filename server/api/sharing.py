"""Shares one server among keys: which jobs a key may see, and which key's request gets a free slot of the engine.

In: the name of a request's key, from `server.api.guard`. Out: whether it may see a job; a slot, when it is its turn.
Never sees a key itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from fastapi import Request

ADMIN = "admin"
"""The name of keys that may see and cancel all jobs."""
MOST_OF_ONE_KEY = 0.75
"""Largest share of the slots for one key, so that another key's request finds a free one."""


@dataclass(frozen=True)
class Caller:
    """The caller of a request: the name of its key; None on a server without keys."""

    key_name: str | None

    def may_see(self, key_name: str | None) -> bool:
        """Whether the caller may see a job of this key. Everybody may see a job that was posted without a key."""
        return self.key_name in (None, ADMIN) or key_name in (None, self.key_name)


def caller_of(request: Request) -> Caller:
    """The caller of a request, as the guard identified it."""
    return Caller(request.scope.get("key_name"))


class EngineSlots:
    """Slots of the expert's engine, given to keys in turn."""

    def __init__(self, slots: int | Callable[[], int]) -> None:
        """`slots`: the number of slots, or a function that returns it."""
        self._slots: Callable[[], int] = slots if callable(slots) else lambda: slots
        self._held: Counter[str | None] = Counter()
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}  # the key whose turn is next comes first

    def of(self, key_name: str | None) -> Callable[[], AbstractAsyncContextManager[None]]:
        """A function that opens a context, in which a request of this key waits for a slot and holds it."""
        return lambda: self._slot(key_name)

    @contextlib.asynccontextmanager
    async def _slot(self, key_name: str | None) -> AsyncIterator[None]:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_name, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the slot was given meanwhile
                self._take_back(key_name)
            raise
        try:
            yield
        finally:
            self._take_back(key_name)

    def _take_back(self, key_name: str | None) -> None:
        self._held[key_name] -= 1
        self._give()

    def _give(self) -> None:
        """Give free slots to the keys in turn, each up to its share."""
        slots = self._slots()
        most = max(1, int(MOST_OF_ONE_KEY * slots))
        while sum(self._held.values()) < slots:
            ready = [name for name in self._waiting if self._held[name] < most]
            if not ready:
                return
            queue = self._waiting.pop(ready[0])
            turn = queue.popleft()
            if queue:
                self._waiting[ready[0]] = queue  # behind the other keys
            if not turn.done():  # else its request has gone
                self._held[ready[0]] += 1
                turn.set_result(None)

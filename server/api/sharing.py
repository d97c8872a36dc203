"""How keys share one server: who asks, what a key sees, and whose request an engine's free slot is for.

In: the name of a request's key, as `server.api.guard` found it. Out: whether it may see a job; a slot, when it is its
turn. Never knows a key itself.
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
"""The name of keys that see and cancel everybody's jobs."""
MOST_OF_ONE_KEY = 0.75
"""Share of the slots that one key may have: another's request finds a free one."""


@dataclass(frozen=True)
class Caller:
    """Who asks: the name of a request's key; None on a server without keys."""

    key_name: str | None

    def may_see(self, key_name: str | None) -> bool:
        """Whether a job is the caller's. One that was posted without a key is everybody's."""
        return self.key_name in (None, ADMIN) or key_name in (None, self.key_name)


def caller_of(request: Request) -> Caller:
    """Who asks, as the guard found out."""
    return Caller(request.scope.get("key_name"))


class EngineSlots:
    """Slots of the expert's engine, given to keys in turn."""

    def __init__(self, slots: int | Callable[[], int]) -> None:
        """`slots`: how many there are, or what says how many there are now."""
        self._slots: Callable[[], int] = slots if callable(slots) else lambda: slots
        self._held: Counter[str | None] = Counter()
        self._waiting: dict[str | None, deque[asyncio.Future[None]]] = {}  # the key whose turn is next comes first

    def of(self, key_name: str | None) -> Callable[[], AbstractAsyncContextManager[None]]:
        """How a request of this key waits for a slot and holds it."""
        return lambda: self._slot(key_name)

    @contextlib.asynccontextmanager
    async def _slot(self, key_name: str | None) -> AsyncIterator[None]:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key_name, deque()).append(turn)
        self._give()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it was given in the meantime
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

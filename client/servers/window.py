"""How much each server may be given, and when: a window of requests, pauses, and the way back.

In: how requests ended. Out: the server with the most room. A server that refuses or fails gets half its window and a
pause; one that failed is probed until it is ready with the same pair as before. Never moves problems itself.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from client.errors import Busy, ServiceError, Unreachable
from client.protocol.requests import PairCards
from client.servers.connection import MOST_REQUESTS, Connection

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
"""After a failure; doubled with each that follows before a line comes, and jittered down to its half."""
PAIR_FIELDS = ("model_fingerprint", "tokenizer_fingerprint", "chat_template_digest", "vocab_size", "dtype")
"""Of a model's card: what servers must share for their trajectories to be of one RUN."""


class ServerWindow:
    """One server during one call of `trajectories`. Window and in_flight count requests."""

    def __init__(self, connection: Connection, pair: PairCards) -> None:
        self.connection, self._pair = connection, pair
        self.window = float(MOST_REQUESTS)
        self.in_flight = self.answered = 0
        self.epoch = 0  # counts pauses, so that requests of one moment that fail together are one failure
        self.trouble: ServiceError | None = None  # why it is not asked now
        self._failures, self._pause = 0, 0.0

    def __str__(self) -> str:
        if self.trouble is None:
            state = f"{self.in_flight} requests in flight"
        else:
            state = "busy" if isinstance(self.trouble, Busy) else "down"
        return f"{self.connection} {state}, {self.answered:,} answered"

    @property
    def vocab_size(self) -> int:
        """Columns of the expert's head."""
        return self._pair.expert.vocab_size

    @property
    def room(self) -> int:
        return 0 if self.trouble else int(self.window) - self.in_flight

    def line_came(self) -> None:
        self.answered += 1
        self._failures = 0

    def request_ended_well(self) -> None:
        """Additive increase: a full window that ends well earns room for one request more."""
        self.window = min(self.window + 1 / self.window, MOST_REQUESTS)

    def request_failed(self, error: Unreachable, epoch: int) -> bool:
        """Multiplicative decrease, once for all requests that were sent in `epoch`; whether this was the first."""
        if epoch != self.epoch:
            return False
        self.epoch += 1
        self.window = max(1.0, self.window / 2)
        self.trouble = error
        self._back_off(error)
        return True

    async def recover(self) -> None:
        """Return when it may be asked again. Raises ServiceError when it is back with another pair, or refuses us."""
        while True:
            await asyncio.sleep(self._pause)
            if isinstance(self.trouble, Busy) or await self._is_back():
                break
        self.trouble = None

    async def _is_back(self) -> bool:
        try:
            waits_for = await self.connection.why_not_ready()
        except ServiceError as error:  # it has failed, or something else answers there: until it is restarted
            waits_for = str(error)
        try:
            pair = None if waits_for else await self.connection.models()
        except Unreachable as error:
            pair, waits_for = None, str(error)
        if pair is None:
            self.trouble = Unreachable(f"{self.connection} is not back: {waits_for}")
            self._back_off(self.trouble)
            return False
        if different := pair_differences(self._pair, pair):
            raise ServiceError(f"{self.connection} came back with another pair: {'; '.join(different)}")
        return True

    def _back_off(self, error: Unreachable) -> None:
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self._failures, 16))
        self._pause = max(error.retry_after, random.uniform(longest / 2, longest))
        self._failures += 1


def roomiest(servers: Sequence[ServerWindow]) -> ServerWindow | None:
    """The server with the most room, or None where none has any."""
    best = max(servers, key=lambda server: server.room)
    return best if best.room > 0 else None


def pair_differences(one: PairCards, other: PairCards) -> list[str]:
    """Where two pairs differ, each as 'expert.field: this against that'."""
    return [
        f"{card.role}.{field}: {getattr(card, field)!r} against {getattr(against, field)!r}"
        for card, against in zip(one, other, strict=True)
        for field in PAIR_FIELDS
        if getattr(card, field) != getattr(against, field)
    ]

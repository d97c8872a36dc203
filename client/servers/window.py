"""How many trajectories each server may have at a time: its window, its pauses, its recovery.

In: a server's slots, and how requests ended. Out: the server with the most room, and the size of its next request. A
window is at first, and at most, twice the slots: as many trajectories wait as run, so that no slot is ever empty. An
overloaded or failed server gets half its window and a pause. A failed server is probed until it is ready again with the
same pair. `client.servers.dispatch` moves its problems to other servers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence

from client.errors import Busy, ServiceError, Unreachable
from client.protocol.requests import PairCards
from client.servers.connection import Connection

TRAJECTORIES_A_REQUEST = 16
"""Small, so that no request waits long for its slowest problem; large, so that the cost of HTTP does not matter."""
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 30.0
"""Pause after a failure. It is doubled with each further failure before a line comes; chance takes up to half of it."""
OUTAGE_SECONDS, SILENT_SECONDS = 5.0, 25.0
"""A server counts as down if it sends no trajectory for the first time after a failure, or if it has requests and sends
nothing for the second time, although heartbeats come every 10 seconds."""
PAIR_FIELDS = (
    "model_fingerprint", "tokenizer_fingerprint", "chat_template_digest", "vocab_size", "dtype", "end_token_ids",
)  # fmt: skip
"""Fields of a model's card that must be equal on all servers of a RUN."""


class ServerWindow:
    """One server during one call of `trajectories`. Window and in_flight count trajectories."""

    def __init__(self, connection: Connection, pair: PairCards) -> None:
        self.connection, self._pair = connection, pair
        self.window = float(self.largest)
        self.in_flight = self.requests = self.answered = 0
        self.epoch = 0  # counts pauses: requests that were sent in the same epoch and fail count as one failure
        self.trouble: ServiceError | None = None  # why it gets no requests now
        self.leaving = False  # no name leads to it: it only finishes its requests
        self._failures, self._pause = 0, 0.0
        self._quiet_since = time.monotonic()
        self._reason = ""  # of the last failure
        self.reported = False  # whether its present outage was reported

    def __str__(self) -> str:
        if self.trouble is None:
            state = f"{self.requests} requests in flight{', leaving' if self.leaving else ''}"
        else:
            state = "busy" if isinstance(self.trouble, Busy) else "down"
        return f"{self.connection} {state}, {self.answered:,} answered"

    @property
    def vocab_size(self) -> int:
        """Columns of the expert's head."""
        return self._pair.expert.vocab_size

    @property
    def largest(self) -> int:
        """The largest window, which a server has until it fails."""
        return 2 * self._pair.slots

    @property
    def request(self) -> int:
        """Trajectories in a full request; the largest window holds at least two of them."""
        return min(TRAJECTORIES_A_REQUEST, self._pair.slots)

    @property
    def room(self) -> int:
        return 0 if self.trouble or self.leaving else int(self.window) - self.in_flight

    def problems(self, n: int) -> int:
        """How many problems, of `n` trajectories each, its next request may hold; 0: it must wait.

        A window that was reduced grows in small steps: the server waits until it has room for a full request.
        """
        if self.leaving:
            return 0
        whole = max(1, self.request // n)
        fitting = max(0, min(whole, self.room // n))
        if self.trouble is None and not self.in_flight:
            return max(1, fitting)
        return fitting if fitting == whole or self.window == self.largest else 0

    def request_began(self, trajectories: int) -> None:
        if not (self.requests or self._failures):
            self._quiet_since = time.monotonic()
        self.requests += 1
        self.in_flight += trajectories

    def request_ended(self, trajectories: int) -> None:
        self.requests -= 1
        self.in_flight -= trajectories

    def line_came(self) -> None:
        self.answered += 1
        self._failures = 0
        self._quiet_since = time.monotonic()

    def outage(self) -> tuple[float, str] | None:
        """For how many seconds the server has owed an answer, and why; None if it does not count as down."""
        if self.leaving or not (self.requests or self.trouble):
            return None
        since = self._quiet_since if self._failures else max(self._quiet_since, self.connection.heard)
        quiet = time.monotonic() - since
        if quiet < (OUTAGE_SECONDS if self._failures and not isinstance(self.trouble, Busy) else SILENT_SECONDS):
            return None
        return quiet, self._reason if self._failures else "it took the requests, and sends nothing"

    def request_went_well(self, trajectories: int) -> None:
        """Additive increase: after a full window of successes there is room for one more request."""
        self.window = min(self.window + self.request * trajectories / self.window, self.largest)

    def request_failed(self, error: Unreachable, epoch: int) -> bool:
        """Multiplicative decrease, once for all requests sent in `epoch`. Returns whether this was the first."""
        if epoch != self.epoch:
            return False
        self.epoch += 1
        self.window = max(float(self.request), self.window / 2)
        self.trouble, self._reason = error, str(error)
        if not self._failures:
            self._quiet_since = max(self._quiet_since, self.connection.heard)
        self._back_off(error)
        return True

    async def recover(self) -> None:
        """Return when the server can get requests again, or has left.

        Raises ServiceError if it serves another pair, or rejects requests.
        """
        while True:
            await asyncio.sleep(self._pause)
            if self.leaving:
                return
            if isinstance(self.trouble, Busy) or await self._is_back():
                break
        self.trouble = None

    async def _is_back(self) -> bool:
        try:
            waits_for = await self.connection.why_not_ready()
        except ServiceError as error:  # it failed, or another program answers there; a restart may help
            waits_for = str(error)
        try:
            pair = None if waits_for else await self.connection.models()
        except Unreachable as error:
            pair, waits_for = None, str(error)
        if pair is None:
            self._reason = waits_for or ""
            self.trouble = Unreachable(f"{self.connection} is not back: {waits_for}")
            self._back_off(self.trouble)
            return False
        if different := pair_differences(self._pair, pair):
            raise ServiceError(f"{self.connection} came back with another pair: {'; '.join(different)}")
        self._pair = pair
        self.window = min(self.window, self.largest)  # it may be back with fewer slots
        return True

    def _back_off(self, error: Unreachable) -> None:
        longest = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(self._failures, 16))
        self._pause = max(error.retry_after, random.uniform(longest / 2, longest))
        self._failures += 1


def roomiest(servers: Sequence[ServerWindow], n: int = 1) -> ServerWindow | None:
    """The server with the most room for problems of `n` trajectories; None if no server has room."""
    return max((server for server in servers if server.problems(n)), key=lambda server: server.room, default=None)


def pair_differences(one: PairCards, other: PairCards) -> list[str]:
    """The differences between two pairs, each as 'expert.field: this against that'."""
    return [
        f"{card.role}.{field}: {getattr(card, field)!r} against {getattr(against, field)!r}"
        for card, against in zip(one, other, strict=True)
        for field in PAIR_FIELDS
        if getattr(card, field) != getattr(against, field)
    ]

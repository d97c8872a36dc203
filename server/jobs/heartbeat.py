"""Renews a job's lease while its owner works: one heartbeat after another, in a thread of its own.

In: a claim on a job and the lease's length. Out: why the work must stop. It never works on the job itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from client.storage.bucket import BucketError
from server.jobs.leases import Claim, Verdict
from server.logs import log

BEATS_A_LEASE = 6
"""Heartbeats within one lease: five may be lost or late before the job is taken by another server."""


class Heartbeat:
    """Beats for a claim, in a thread of its own: neither a busy event loop nor other waits for the bucket delay it."""

    def __init__(self, claim: Claim, lease_seconds: float) -> None:
        self._claim, self._lease = claim, lease_seconds
        self._written = time.monotonic()
        self._enough = threading.Event()
        self._beating: asyncio.Future[Verdict] | None = None

    async def beats(self) -> Verdict:
        """Return when there is a reason to stop. Raises BucketError when no beat could be written for a lease."""
        thread = ThreadPoolExecutor(1, f"beat-{self._claim.job_id}")
        beating = self._beating = asyncio.get_running_loop().run_in_executor(thread, self._beat)
        try:
            while True:
                done, _ = await asyncio.wait({beating}, timeout=self._lease / BEATS_A_LEASE)
                if done:
                    return beating.result()
                if time.monotonic() - self._written > self._lease:
                    raise BucketError(f"{self._claim.job_id}: no sign of life could be written for {self._lease:g} s")
        finally:
            self._enough.set()
            thread.shutdown(wait=False)

    async def stopped(self) -> None:
        """Return when no beat is on its way any more: it must not come after a last word."""
        if self._beating:
            await asyncio.wait({self._beating})

    def _beat(self) -> Verdict:
        while not self._enough.wait(self._lease / BEATS_A_LEASE):
            began = time.monotonic()
            try:
                if (verdict := self._claim.beat()) is not Verdict.GO_ON:
                    return verdict
                self._written = began
            except BucketError as error:
                log.warning("%s: %s", self._claim.job_id, error)
        return Verdict.GO_ON

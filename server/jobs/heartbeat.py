"""Renews a job's lease while its owner works: one heartbeat after another, in a thread of its own.

In: a claim on a job and the lease's length. Out: why the work must stop. It never works on the job itself.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from client.storage.bucket import BucketError
from server.jobs.leases import Claim, LeaseState
from server.logs import log

HEARTBEATS_PER_LEASE = 6
"""Heartbeats within one lease: five may be lost or late before the job is taken by another server."""


class HeartbeatThread:
    """Renews a claim in a thread of its own, so that neither a busy event loop nor other bucket calls delay it."""

    def __init__(self, claim: Claim, lease_seconds: float) -> None:
        self._claim, self._lease_seconds = claim, lease_seconds
        self._written = time.monotonic()
        self._enough = threading.Event()
        self._beating: asyncio.Future[LeaseState] | None = None

    async def until_ended(self) -> LeaseState:
        """Return the lease's state once it is not held. Raises BucketError after a lease without a heartbeat."""
        thread = ThreadPoolExecutor(1, f"beat-{self._claim.job_id}")
        beating = self._beating = asyncio.get_running_loop().run_in_executor(thread, self._beat)
        try:
            while True:
                done, _ = await asyncio.wait({beating}, timeout=self._lease_seconds / HEARTBEATS_PER_LEASE)
                if done:
                    return beating.result()
                if time.monotonic() - self._written > self._lease_seconds:
                    raise BucketError(f"{self._claim.job_id}: no heartbeat written for {self._lease_seconds:g} s")
        finally:
            self._enough.set()
            thread.shutdown(wait=False)

    async def stopped(self) -> None:
        """Return when no heartbeat is still being written: none may arrive after the job's end."""
        if self._beating:
            await asyncio.wait({self._beating})

    def _beat(self) -> LeaseState:
        while not self._enough.wait(self._lease_seconds / HEARTBEATS_PER_LEASE):
            began = time.monotonic()
            try:
                if (lease := self._claim.renew()) is not LeaseState.HELD:
                    return lease
                self._written = began
            except BucketError as error:
                log.warning("%s: %s", self._claim.job_id, error)
        return LeaseState.HELD

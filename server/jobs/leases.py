"""Which server owns a job: creating owner-N takes the job, rewriting beat-N (the heartbeat) keeps the lease.

Any number of servers on one bucket follow this protocol. The store must offer exclusive create and nothing else.
A lease has expired when the heartbeat has not changed for the lease time of the owner or of the observer, whichever
is longer, on the observer's own monotonic clock. The observer then creates owner-N+1. An owner that wakes up late
finds N+1 and stops; what it wrote meanwhile is parts of the same RUN, and readers keep the first of each key. Nothing
here works on a job. Calls block; they raise BucketError when the store fails.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection
from enum import Enum

from client.protocol.requests import JobError, RequestCounts
from server.jobs.store import DAMAGED, Heartbeat, JobFolder, JobStore
from server.logs import log

MOST_FRUITLESS_OWNERS = 5
"""Owners in a row that ended without adding anything. Then the job fails: it must not crash every server in turn."""


class LeaseState(Enum):
    """The state of a lease, which its owner checks at each heartbeat."""

    HELD = "held"
    CANCELLED = "cancelled"
    LOST = "lost"
    """Another server owns the job or has ended it: this one writes nothing more about it."""


class Claim:
    """This server's ownership of one job, as its Nth owner."""

    def __init__(self, store: JobStore, job_id: str, owner: int, heartbeat: Heartbeat, lease_seconds: float) -> None:
        self.job_id, self.owner = job_id, owner
        self.state = heartbeat
        """The job's progress, as the next heartbeat records it. The worker replaces it."""
        self._store, self._counter, self._lease_seconds = store, 0, lease_seconds

    def renew(self) -> LeaseState:
        """Check that the job is still ours, then write a heartbeat with the current `state`."""
        lease = self.check()
        if lease is not LeaseState.LOST:
            self._write()
        return lease

    def check(self) -> LeaseState:
        """Whether the job is still ours and not cancelled. Writes nothing."""
        folder = self._store.folder(self.job_id)
        if folder.owner > self.owner or folder.ended:
            return LeaseState.LOST
        return LeaseState.CANCELLED if folder.cancelled else LeaseState.HELD

    def release(self, stopping: bool) -> None:
        """Hand the job back: any server may take it at once. An owner that is `stopping` is not fruitless."""
        if self.check() is not LeaseState.LOST:
            if stopping:
                self.state = self.state.model_copy(update={"fruitless": max(0, self.state.fruitless - 1)})
            self._write(released=True)

    def complete(self, counts: RequestCounts) -> None:
        """Record that the RUN is sealed. It is true whoever records it, so an owner that lost its lease may too."""
        self._store.end(self.job_id, "completed", self.state.model_copy(update={"request_counts": counts}))

    def fail(self, error: JobError) -> None:
        """Record the failure, but only while the lease is held: another owner may be about to finish the job."""
        lease = self.check()
        if lease is LeaseState.CANCELLED:
            self._store.end(self.job_id, "cancelled", self.state)
        elif lease is LeaseState.HELD:
            self._store.end(self.job_id, "failed", self.state, error)

    def cancelled(self) -> None:
        """Record that the job is cancelled."""
        self._store.end(self.job_id, "cancelled", self.state)

    def _write(self, released: bool = False) -> None:
        self._counter += 1
        heartbeat = self.state.model_copy(
            update={"counter": self._counter, "released": released, "lease_seconds": self._lease_seconds}
        )
        self._store.write_heartbeat(self.job_id, self.owner, heartbeat)


class Claimant:
    """Looks for a job to own. Remembers for every owner since when its heartbeat has not changed."""

    def __init__(self, store: JobStore, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._lease_seconds, self._clock = store, lease_seconds, clock
        self._damaged: set[str] = set()
        self._turns: Counter[str | None] = Counter()  # by the name of an API key: the number of its last claim here
        self._unchanged: dict[str, tuple[int, Heartbeat | None, float]] = {}  # by job: owner, its heartbeat, since when

    def claim(self, waiting: Collection[str] = ()) -> Claim | None:
        """Take the oldest job that is free or whose lease has expired, of the API keys in turn; None if there is none.

        `waiting`: jobs to leave alone for now, unless they are cancelled.
        """
        unfinished = self._store.unfinished()
        self._unchanged = {job_id: seen for job_id, seen in self._unchanged.items() if job_id in set(unfinished)}
        names = self._store.key_names(unfinished)
        for job_id in sorted(unfinished, key=lambda job_id: self._turns[names[job_id]]):  # sorted keeps their order
            try:
                if claim := self._claimed(job_id, job_id in waiting):
                    self._turns[names[job_id]] = max(self._turns.values(), default=0) + 1
                    return claim
            except DAMAGED as error:  # it must not block the other jobs
                if job_id not in self._damaged:
                    log.error("skipping %s: an object in its folder is damaged: %s", job_id, error)
                self._damaged.add(job_id)
        return None

    def end_cancelled(self) -> None:
        """End the cancelled jobs whose lease has expired: servers that are busy for hours would not reach them."""
        for job_id in self._store.unfinished():
            with contextlib.suppress(*DAMAGED):
                if self._store.folder(job_id).cancelled:
                    self._claimed(job_id)  # claiming a cancelled job ends it

    def _claimed(self, job_id: str, only_if_cancelled: bool = False) -> Claim | None:
        folder = self._store.folder(job_id)
        if only_if_cancelled and not folder.cancelled:
            return None
        if not folder.whole or folder.ended or self._store.record(job_id) is None or not self._is_free(job_id, folder):
            return None
        owner = folder.owner + 1
        return self._begin(job_id, owner, folder.heartbeat_owner) if self._store.take(job_id, owner) else None

    def _is_free(self, job_id: str, folder: JobFolder) -> bool:
        if folder.owner == 0:
            return True
        heartbeat = self._store.heartbeat(job_id, folder.owner)
        if heartbeat and heartbeat.released:
            return True
        now = self._clock()
        owner, seen, since = self._unchanged.get(job_id, (0, None, now))
        if (owner, seen) != (folder.owner, heartbeat):
            since = now
        self._unchanged[job_id] = (folder.owner, heartbeat, since)
        return now - since > max(self._lease_seconds, heartbeat.lease_seconds if heartbeat else 0.0)

    def _begin(self, job_id: str, owner: int, last_owner: int) -> Claim | None:
        """The first check and heartbeat of a new owner, who continues from the last recorded progress."""
        record = self._store.record(job_id)
        assert record is not None
        last = self._store.heartbeat(job_id, last_owner) or Heartbeat(request_counts=RequestCounts(total=record.total))
        claim = Claim(
            self._store, job_id, owner, last.model_copy(update={"fruitless": last.fruitless + 1}), self._lease_seconds
        )
        lease = claim.renew()
        if lease is LeaseState.HELD and last.fruitless >= MOST_FRUITLESS_OWNERS:
            said = f"{last.fruitless} servers in a row took this job and stopped before they added anything to the RUN"
            claim.fail(JobError(type="engine_error", detail=f"{said}; see their logs"))
            return None
        if lease is LeaseState.CANCELLED:
            claim.cancelled()
        return claim if lease is LeaseState.HELD else None

"""Who works on a job: exclusive create of owner-N makes an owner, a beat-N that changes keeps it one.

Any number of servers on one bucket follow this, and need nothing of the store but exclusive create. An owner whose
beat has not changed for its lease, or for the watcher's where that is longer, on the watcher's own monotonic clock,
is taken for dead, and its job is taken as owner-N+1. One that wakes up late finds N+1 and stops; what it wrote
meanwhile is parts of the same RUN, which readers tell apart by key. Calls block; they raise BucketError where the
store fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from enum import Enum

from pydantic import ValidationError

from client.protocol.requests import JobError, RequestCounts
from server.jobs.store import Beat, JobFolder, JobStore
from server.logs import log

MOST_FRUITLESS = 5
"""Owners in a row that ended without having added anything: a job that ends servers must not end them all for ever."""


class Verdict(Enum):
    """What an owner learns at each beat."""

    GO_ON = "go on"
    CANCEL = "cancel"
    LOST = "lost"
    """Another server owns the job, or has ended it: not a word more about it."""


class Claim:
    """This server's ownership of one job, as its Nth owner."""

    def __init__(self, store: JobStore, job_id: str, owner: int, beat: Beat, lease_seconds: float) -> None:
        self.job_id, self.owner = job_id, owner
        self.state = beat
        """How far the job is, as the next beat tells it; whoever works on it replaces it."""
        self._store, self._counter, self._lease = store, 0, lease_seconds

    def beat(self) -> Verdict:
        """Give a sign of life with `state` as it is; see first whether the job is still ours."""
        verdict = self.look()
        if verdict is not Verdict.LOST:
            self._write()
        return verdict

    def look(self) -> Verdict:
        """Whether the job is still ours, and still wanted."""
        folder = self._store.folder(self.job_id)
        if folder.owner > self.owner or folder.ended:
            return Verdict.LOST
        return Verdict.CANCEL if folder.cancelled else Verdict.GO_ON

    def release(self, told_to: bool) -> None:
        """Hand the job back: any server may take it at once. One that was told to stop has not failed at it."""
        if self.look() is not Verdict.LOST:
            if told_to:
                self.state = self.state.model_copy(update={"fruitless": max(0, self.state.fruitless - 1)})
            self._write(released=True)

    def complete(self, counts: RequestCounts) -> None:
        """The RUN is sealed. True whoever says it, so an owner that was taken for dead may as well."""
        self._store.end(self.job_id, "completed", self.state.model_copy(update={"request_counts": counts}))

    def fail(self, error: JobError) -> None:
        """Only an owner may give a job up: another one may be about to finish it."""
        verdict = self.look()
        if verdict is Verdict.CANCEL:
            self._store.end(self.job_id, "cancelled", self.state)
        elif verdict is Verdict.GO_ON:
            self._store.end(self.job_id, "failed", self.state, error)

    def cancelled(self) -> None:
        self._store.end(self.job_id, "cancelled", self.state)

    def _write(self, released: bool = False) -> None:
        self._counter += 1
        beat = self.state.model_copy(
            update={"counter": self._counter, "released": released, "lease_seconds": self._lease}
        )
        self._store.write_beat(self.job_id, self.owner, beat)


class Claimant:
    """Looks for a job to own. Remembers of every owner since when its beat has not changed."""

    def __init__(self, store: JobStore, lease_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._lease, self._clock = store, lease_seconds, clock
        self._damaged: set[str] = set()
        self._unchanged: dict[str, tuple[int, Beat | None, float]] = {}  # by job: owner, its beat, since when

    def claim(self) -> Claim | None:
        """The oldest job that is free or whose owner is dead, now ours; None where there is none."""
        unfinished = self._store.unfinished()
        self._unchanged = {job_id: seen for job_id, seen in self._unchanged.items() if job_id in set(unfinished)}
        for job_id in unfinished:
            try:
                if claim := self._claimed(job_id):
                    return claim
            except ValidationError as error:  # of an object in its folder, which must not keep the others waiting
                if job_id not in self._damaged:
                    log.error("%s cannot be read, and is left alone: %s", job_id, error)
                self._damaged.add(job_id)
        return None

    def end_cancelled(self) -> None:
        """End the cancelled jobs whose owners are dead: servers that are busy for hours would not come to them."""
        for job_id in self._store.unfinished():
            with contextlib.suppress(ValidationError):
                if self._store.folder(job_id).cancelled:
                    self._claimed(job_id)  # a claim of what is cancelled ends it

    def _claimed(self, job_id: str) -> Claim | None:
        folder = self._store.folder(job_id)
        if not folder.whole or folder.ended or self._store.record(job_id) is None or not self._is_free(job_id, folder):
            return None
        owner = folder.owner + 1
        return self._begin(job_id, owner, folder.beat) if self._store.take(job_id, owner) else None

    def _is_free(self, job_id: str, folder: JobFolder) -> bool:
        if folder.owner == 0:
            return True
        beat = self._store.beat(job_id, folder.owner)
        if beat and beat.released:
            return True
        now = self._clock()
        owner, seen, since = self._unchanged.get(job_id, (0, None, now))
        if (owner, seen) != (folder.owner, beat):
            since = now
        self._unchanged[job_id] = (folder.owner, beat, since)
        return now - since > max(self._lease, beat.lease_seconds if beat else 0.0)

    def _begin(self, job_id: str, owner: int, last_beat: int) -> Claim | None:
        """The first look and sign of life of a new owner, who goes on from what the last one said."""
        record = self._store.record(job_id)
        assert record is not None
        last = self._store.beat(job_id, last_beat) or Beat(request_counts=RequestCounts(total=record.total))
        claim = Claim(
            self._store, job_id, owner, last.model_copy(update={"fruitless": last.fruitless + 1}), self._lease
        )
        verdict = claim.beat()
        if verdict is Verdict.GO_ON and last.fruitless >= MOST_FRUITLESS:
            said = (
                f"{last.fruitless} servers took it, one after the other, and each ended without having added to the RUN"
            )
            claim.fail(JobError(type="engine_error", detail=f"{said}; their logs say why"))
            return None
        if verdict is Verdict.CANCEL:
            claim.cancelled()
        return claim if verdict is Verdict.GO_ON else None

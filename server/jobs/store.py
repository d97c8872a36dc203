"""The jobs of a bucket, as objects that every server reads the same way. Never runs or owns a job.

    jobs/ID/problems.jsonl     the problems that came with the request; written first
    jobs/ID/job.json           what to do; once it is there, the job exists
    jobs/ID/owner-N            the Nth server that took the job (`server.jobs.leases`)
    jobs/ID/beat-N             its heartbeat, with the job's progress; rewritten
    jobs/ID/cancel             a request to cancel the job
    jobs/ID/end.json           the job's final status
    jobs/ended/ID              marks the job as ended, so that a server need not read every old job when it starts
    jobs/idempotency/DIGEST    the job that was made for an idempotency key

All objects except beat-N are created exclusively and never change: of two writers one wins, and both can see which.
IDs sort by time. Calls block. They raise BucketError if the store fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.errors import ProblemSetError
from client.problems.problem_set import ProblemSet
from client.problems.reader import read_problem_set
from client.protocol.requests import ENDED, Job, JobError, JobRequest, JobStatus, JobTerms, Problem, RequestCounts
from client.storage.bucket import Bucket, OddObject
from server import metrics
from server.jobs.paths import JOBS_FOLDER, BucketPaths, OutsideBucket
from server.logs import log

ID = re.compile(r"job-\d{13}-[0-9a-f]{8}")
KEYS, ENDS = f"{JOBS_FOLDER}/idempotency", f"{JOBS_FOLDER}/ended"
TIME = re.compile(rb"\d{1,12}")
"""Seconds since the epoch, as an object holds them."""
LOOKUP_THREADS = 16
"""Jobs that are read at the same time: one by one is slow on a remote store."""
MOST_OBJECT_BYTES, MOST_PROBLEMS_BYTES = 2**24, 2**28
"""Most bytes of an object of a job, and of its problems. A larger job is rejected when it is posted."""
OWN_FIELDS_BYTES = 2**12
"""More bytes than the store adds to a job's fields."""
DAMAGED = (ValidationError, OddObject)
"""One object cannot be read; the store and the other objects can."""


class TooManyJobs(Exception):
    """The service has as many open jobs as it allows."""


class KeyReused(Exception):
    """An idempotency key cannot be used again; the message says why."""


class JobTooLarge(Exception):
    """A part of a job is too large to be read again; the message says which."""


class JobRecord(JobTerms):
    """job.json. `run` and `problems_url` are names in the bucket. `total` is 0 if the job has a problems_url."""

    model_config = ConfigDict(extra="ignore")  # a newer version of the service may have written more fields

    created_at: int
    total: int
    key_name: str | None = None
    """The name of the API key that posted the job, never the key; None on a server without keys."""


class Heartbeat(BaseModel):
    """beat-N: the owner's heartbeat, with the job's progress."""

    counter: int = 0
    released: bool = False  # the owner gave the job back: the next owner need not wait
    lease_seconds: float = 0.0  # the owner's lease: how long it may go without a heartbeat
    fruitless: int = 0  # owners in a row, with this one, that have added nothing to the RUN
    phase: Literal["validating", "in_progress", "finalizing"] = "validating"
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    request_counts: RequestCounts


class Marker(BaseModel):
    """jobs/idempotency/DIGEST: the job that an idempotency key made, and the digest of its request."""

    id: str = Field(pattern=ID.pattern)
    body: str


class JobFolder:
    """The names under jobs/ID/, listed once."""

    def __init__(self, names: set[str]) -> None:
        self.whole = "job.json" in names
        self.cancelled = "cancel" in names
        self.ended = "end.json" in names
        self.owner = _highest("owner-", names)
        """The number of the last owner; 0: no owner yet."""
        self.heartbeat_owner = _highest("beat-", names)
        """The last owner that wrote a heartbeat."""


class JobStore:
    """The jobs of one bucket."""

    def __init__(self, bucket: str) -> None:
        self.bucket, self.paths = Bucket(bucket), BucketPaths(bucket)
        self.listed = 0  # how many jobs the last listing had, also ended ones
        self._key_names: dict[str, str | None] = {}  # of jobs that were read; they never change
        self._ended: set[str] | None = None  # jobs that are known to have ended; they never change again

    def post(
        self, request: JobRequest, key: str | None, most_open: int, key_name: str | None = None, keys: int = 1
    ) -> str:
        """Make a job, or find the job that the idempotency key already made; returns its ID.

        `run` and `problems_url` must be names in the bucket. `key_name`: the name of the API key that posts the job;
        `keys`: how many share `most_open`. Raises TooManyJobs, KeyReused or JobTooLarge.
        """
        asked = request.model_dump(exclude=request.unsaid)
        body = orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)
        problems = len(orjson.dumps(asked.get("problems")))
        for part, size, most in (
            ("problems", problems, MOST_PROBLEMS_BYTES),
            ("other fields", len(body) - problems, MOST_OBJECT_BYTES - OWN_FIELDS_BYTES),
        ):
            if size > most:
                raise JobTooLarge(f"its {part} take {size:,} bytes, and those of a job {most:,} at most")
        marker = {"id": _new_id(), "body": hashlib.sha256(body).hexdigest()}
        whose = f"{key_name}\n{key}" if key_name else key  # two API keys may choose the same idempotency key
        name = f"{KEYS}/{hashlib.sha256(whose.encode()).hexdigest()}" if whose and key else None
        made = self._marker(name) if name else None
        if made is None:
            self._check_room(most_open, key_name, keys)
            if name and not self.bucket.create(name, orjson.dumps(marker)):
                made = self._marker(name)
        if made is not None:
            if made.body != marker["body"]:
                raise KeyReused(f"made job {made.id} from another request")
            marker["id"] = made.id
        self._write(marker["id"], request, key_name)
        return marker["id"]

    def ids(self) -> list[str]:
        """The IDs of all jobs, oldest first, also of ended and incomplete ones."""
        found = [name for name in self.bucket.folders(JOBS_FOLDER) if ID.fullmatch(name)]
        self.listed = len(found)
        return found

    def unfinished(self) -> list[str]:
        """The IDs of the jobs that are not known to have ended, oldest first."""
        ended = self._known_ends()
        return [job_id for job_id in self.ids() if job_id not in ended]

    def open_by_status(self) -> dict[str, int]:
        """The number of open jobs by status."""
        with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
            found = Counter(pool.map(lambda job: self._status(*job), self._open().items()))
        return {status: found[status] for status in get_args(JobStatus) if status not in ENDED}

    def _open(self) -> dict[str, JobFolder]:
        """The complete jobs that have not ended."""
        unfinished = self.unfinished()
        with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
            looks = zip(unfinished, pool.map(self.folder, unfinished), strict=True)
            return {job_id: folder for job_id, folder in looks if folder.whole and not folder.ended}

    def _status(self, job_id: str, folder: JobFolder) -> JobStatus:
        try:
            heartbeat = self.heartbeat(job_id, folder.heartbeat_owner)
        except DAMAGED:  # the others are still counted
            heartbeat = None
        return "cancelling" if folder.cancelled else heartbeat.phase if heartbeat else "validating"

    def _known_ends(self) -> set[str]:
        if self._ended is None:
            self._ended = {name.rpartition("/")[2] for name in self.bucket.names(ENDS)}
        return self._ended

    def folder(self, job_id: str) -> JobFolder:
        """List a job's objects. If the job has ended, this is remembered."""
        folder = JobFolder({name.rpartition("/")[2] for name in self.bucket.names(f"{JOBS_FOLDER}/{job_id}")})
        if folder.ended:
            self._known_ends().add(job_id)
        return folder

    def job(self, job_id: str) -> Job | None:
        """The job as clients see it. None if the job does not exist."""
        if not ID.fullmatch(job_id):
            return None
        if end := self._get(job_id, "end.json"):
            self._known_ends().add(job_id)
            return self._told(Job.model_validate_json(end))
        if (record := self.record(job_id)) is None:
            return None
        return self._told(self.state(job_id, record, self.folder(job_id)))

    def page(
        self, limit: int, after: str | None, may_see: Callable[[str | None], bool] = lambda key_name: True
    ) -> tuple[list[Job], bool]:
        """The newest `limit` jobs, newest first, and whether there are more. `after`: only jobs older than this one.

        `may_see`: whether to list the jobs of a key with this name.
        """
        ids = [job_id for job_id in reversed(self.ids()) if after is None or job_id < after]
        found: list[Job] = []
        with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
            while ids and len(found) <= limit:
                wanted = limit + 1 - len(found)
                names = self.key_names(ids[:wanted])
                found += filter(None, pool.map(self._readable, (job_id for job_id in names if may_see(names[job_id]))))
                ids = ids[wanted:]
        return found[:limit], len(found) > limit

    def _readable(self, job_id: str) -> Job | None:
        """A job for a list; None if its objects are damaged, so that the others are still listed."""
        try:
            return self.job(job_id)
        except DAMAGED as error:
            log.error("%s cannot be read: %s", job_id, error)
            return None

    def key_name(self, job_id: str) -> str | None:
        """The name of the API key that posted a job; None if it has none, or is damaged."""
        if job_id not in self._key_names:
            try:
                if (record := self.record(job_id)) is None:
                    return None
            except DAMAGED:
                return None
            self._key_names[job_id] = record.key_name
        return self._key_names[job_id]

    def key_names(self, job_ids: list[str]) -> dict[str, str | None]:
        """`key_name` of each job."""
        with ThreadPoolExecutor(LOOKUP_THREADS) as pool:
            return dict(zip(job_ids, pool.map(self.key_name, job_ids), strict=True))

    def record(self, job_id: str) -> JobRecord | None:
        data = self._get(job_id, "job.json")
        return JobRecord.model_validate_json(data) if data else None

    def problems(
        self, job_id: str, record: JobRecord, most: int, stopped: Callable[[], bool] = lambda: False
    ) -> ProblemSet:
        """A job's problems, at most `most` + 1. Raises ProblemSetError, OutsideBucket, or Stopped."""
        if record.problems_url:
            url = self.paths.url(record.problems_url)
            return read_problem_set(url, most + 1, stopped=stopped)
        if (data := self._get(job_id, "problems.jsonl", MOST_PROBLEMS_BYTES)) is None:
            raise ProblemSetError(f"{job_id}: its problems.jsonl is gone from the bucket; submit the job again")
        return ProblemSet.of(map(Problem.model_validate_json, data.splitlines()))

    def state(self, job_id: str, record: JobRecord, folder: JobFolder, last: Heartbeat | None = None) -> Job:
        """The status of an unfinished job. `last`: its last heartbeat; read from the bucket if not given."""
        heartbeat = (
            last
            or self.heartbeat(job_id, folder.heartbeat_owner)
            or Heartbeat(request_counts=RequestCounts(total=record.total))
        )
        cancelled_from = None
        if folder.cancelled:  # by anybody, with any content
            with contextlib.suppress(OddObject):
                cancelled_from = self._get(job_id, "cancel")
        if cancelled_from and not TIME.fullmatch(cancelled_from):
            cancelled_from = None
        return Job(
            id=job_id,
            status="cancelling" if folder.cancelled else heartbeat.phase,
            run=record.run,
            created_at=record.created_at,
            in_progress_at=heartbeat.in_progress_at,
            finalizing_at=heartbeat.finalizing_at,
            cancelling_at=int(cancelled_from) if cancelled_from else None,
            request_counts=heartbeat.request_counts,
        )

    def heartbeat(self, job_id: str, owner: int) -> Heartbeat | None:
        """The last heartbeat of an owner; None if it wrote none."""
        data = self._get(job_id, f"beat-{owner}") if owner else None
        return Heartbeat.model_validate_json(data) if data else None

    def write_heartbeat(self, job_id: str, owner: int, heartbeat: Heartbeat) -> None:
        self.bucket.put(f"{JOBS_FOLDER}/{job_id}/beat-{owner}", heartbeat.model_dump_json().encode())

    def take(self, job_id: str, owner: int) -> bool:
        """Try to become the job's owner with this number. Returns whether this call did."""
        return self.bucket.create(f"{JOBS_FOLDER}/{job_id}/owner-{owner}", b"%d" % int(time.time()))

    def cancel(self, job_id: str) -> Job | None:
        """Request that a job is cancelled; without an owner, it is cancelled at once. Returns the job's status.

        A new owner looks for `cancel` after it has taken the job, so no request is lost. None: no such job.
        """
        job = self.job(job_id)
        if job is None or job.status in ENDED:
            return job
        self.bucket.create(f"{JOBS_FOLDER}/{job_id}/cancel", b"%d" % int(time.time()))
        if self.folder(job_id).owner == 0:
            self.end(job_id, "cancelled")
        return self.job(job_id)

    def end(
        self,
        job_id: str,
        status: Literal["completed", "failed", "cancelled"],
        last: Heartbeat | None = None,
        error: JobError | None = None,
    ) -> bool:
        """Record how a job ended. Returns whether this call did.

        `last`: its last heartbeat; read from the bucket if not given.
        """
        record = self.record(job_id)
        assert record is not None
        job = self.state(job_id, record, self.folder(job_id), last)
        changes = {"status": status, f"{status}_at": int(time.time()), "error": error}
        ended = job.model_copy(update=changes).model_dump_json().encode()
        first = self.bucket.create(f"{JOBS_FOLDER}/{job_id}/end.json", ended)
        self.bucket.create(f"{ENDS}/{job_id}", b"")
        self._known_ends().add(job_id)
        if first:
            metrics.JOBS_ENDED.labels(status).inc()
        return first

    def _check_room(self, most_open: int, key_name: str | None, keys: int) -> None:
        """Raise TooManyJobs if `most_open` jobs are open and this key has its share of them.

        Reads each job only when there may be too many.
        """
        if len(self.unfinished()) < most_open or len(found := self._open()) < most_open:
            return
        if list(self.key_names(list(found)).values()).count(key_name) >= most_open // keys:
            raise TooManyJobs

    def _write(self, job_id: str, request: JobRequest, key_name: str | None) -> None:
        problems = request.problems or []
        record = JobRecord(
            **request.model_dump(exclude={"problems"}),
            created_at=int(job_id.split("-")[1]) // 1000,
            total=len(problems) * request.n,
            key_name=key_name,
        )
        if problems:
            lines = (problem.model_dump_json(exclude_none=True).encode() for problem in problems)
            self.bucket.create(f"{JOBS_FOLDER}/{job_id}/problems.jsonl", b"\n".join(lines))
        self.bucket.create(f"{JOBS_FOLDER}/{job_id}/job.json", record.model_dump_json().encode())

    def _told(self, job: Job) -> Job:
        try:
            return job.model_copy(update={"run": self.paths.url(job.run)})
        except OutsideBucket:  # the path has become a link; the job fails with that reason
            return job

    def _get(self, job_id: str, name: str, most: int = MOST_OBJECT_BYTES) -> bytes | None:
        return self.bucket.get(f"{JOBS_FOLDER}/{job_id}/{name}", most)

    def _marker(self, name: str) -> Marker | None:
        """The marker of an idempotency key; None if the key is new."""
        try:
            data = self.bucket.get(name, MOST_OBJECT_BYTES)
            return None if data is None else Marker.model_validate_json(data)
        except DAMAGED:
            raise KeyReused(f"has a damaged marker in the bucket, {name}; move that object away") from None


def _new_id() -> str:
    return f"job-{time.time_ns() // 1_000_000:013d}-{secrets.token_hex(4)}"


def _highest(prefix: str, names: set[str]) -> int:
    numbers = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)

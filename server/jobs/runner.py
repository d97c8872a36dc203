"""Works on the bucket's jobs, one at a time, oldest first, with the server's own pair.

In: jobs that any server accepted. Out: their RUNs, written by `client.sampling.sampler`, and their final status. The
event loop never waits for the bucket. A server that stops, or whose engines died, gives its job back to the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import time
from dataclasses import dataclass

from client.errors import ProblemSetError, RunError, ServiceError, Stopped
from client.problems.problem_set import ProblemSet
from client.protocol.requests import (
    ContrastSettings,
    JobError,
    RequestCounts,
    SamplingSettings,
)
from client.retries import pause_after
from client.runs.run import Run
from client.sampling.sampler import sample_problems
from client.sampling.writer import Counts
from client.storage.bucket import BucketError
from server import logs, metrics
from server.engines.pair import Pair
from server.jobs.heartbeat import HeartbeatThread
from server.jobs.leases import Claim, Claimant, LeaseState
from server.jobs.pair_source import PairSource
from server.jobs.paths import OutsideBucket
from server.jobs.store import JobRecord, JobStore
from server.logs import log
from server.settings import ServerSettings

JOB_POLL_SECONDS = 1.0
"""Time between two searches for a job. It grows by the same for every thousand jobs in the bucket."""
JOB_COUNT_SECONDS = 15.0
"""Time between two counts of the open jobs."""
MOST_JOB_ATTEMPTS = 8
"""After this many attempts in a row that add nothing to the RUN, the job fails."""
FIRST_JOB_PAUSE_SECONDS, LONGEST_JOB_PAUSE_SECONDS = 1.0, 30.0
"""First and longest pause after an attempt that added nothing; doubled each time."""
NEVER_PASSES = re.compile(
    rf"os error ({'|'.join(map(str, (errno.EPERM, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EROFS)))})\b"
)
"""Errors of a file system that a retry does not fix."""
HAND_BACK_SECONDS = 5.0
"""How long a job may take to end after the grace period."""
ERROR_TYPES: dict[type[Exception], str] = {
    ProblemSetError: "problem_set_error",
    RunError: "run_error",
    ServiceError: "engine_error",
    BucketError: "bucket_error",
    OutsideBucket: "outside_bucket",
}


class JobProgress:
    """Keeps a claim's progress up to date for its heartbeats."""

    def __init__(self, claim: Claim) -> None:
        self._claim, self.brought = claim, 0  # trajectories and failures that this attempt added to the RUN
        self.begun = False
        """Whether the RUN could be opened and written."""

    def say(self, text: str) -> None:
        log.info(text)

    def update(self, counts: Counts) -> None:
        state, now, self.begun = self._claim.state, int(time.time()), True
        all_asked = counts.done + counts.failed == counts.total
        self.brought = counts.written + counts.written_failures
        self._claim.state = state.model_copy(
            update={
                "phase": "finalizing" if all_asked else "in_progress",
                "fruitless": 0 if self.brought else state.fruitless,
                "in_progress_at": state.in_progress_at or now,
                "finalizing_at": state.finalizing_at or (now if all_asked else None),
                "request_counts": RequestCounts(
                    total=counts.there + counts.given_up + counts.total,
                    completed=counts.there + counts.written,
                    failed=counts.given_up + counts.written_failures,
                ),
            }
        )


@dataclass(frozen=True)
class Attempts:
    """This server's attempts at a job that waits for its next one. Other jobs go first; another server may take it."""

    fruitless: int  # in a row
    due: float  # on the monotonic clock


class JobRunner:
    """Works on the bucket's jobs from `start` to `drain`."""

    def __init__(self, bucket: str, settings: ServerSettings, versions: dict[str, str]) -> None:
        self.store, self.settings = JobStore(bucket), settings
        self._versions = versions
        self._claimant = Claimant(self.store, settings.lease_seconds)
        self._reaper = Claimant(self.store, settings.lease_seconds)  # ends cancelled jobs while a job is running
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[None] | None = None
        self._source: PairSource | None = None
        self._stopping = False
        self._woken = asyncio.Event()
        self._later: dict[str, Attempts] = {}

    def start(self, pair: Pair) -> None:
        """Start taking jobs. The pair must be ready."""
        if not self._stopping:
            self._loop = asyncio.get_running_loop()
            self._task = asyncio.create_task(self._run(pair))
            self._counting = asyncio.create_task(self._count())

    def wake(self) -> None:
        """Look for a new job now. May be called from any thread."""
        if self._loop:
            self._loop.call_soon_threadsafe(self._woken.set)

    async def drain(self, grace_seconds: float) -> None:
        """Take no more jobs, write finished trajectories, and hand the job back, within the grace period."""
        self._stopping = True
        self._woken.set()
        if self._source:
            self._source.stop()
        if self._task:
            _, late = await asyncio.wait({self._task}, timeout=grace_seconds)
            for task in late:
                log.warning("a job did not end within %g s: giving it back as it is", grace_seconds)
                task.cancel()
                await asyncio.wait({task}, timeout=HAND_BACK_SECONDS)

    async def _count(self) -> None:
        """While the server runs: count the open jobs, and end cancelled jobs that no server owns."""
        while True:
            try:
                await asyncio.to_thread(self._reaper.end_cancelled)
                for status, count in (await asyncio.to_thread(self.store.open_by_status)).items():
                    metrics.JOBS.labels(status).set(count)
            except Exception as error:  # a store that fails, a damaged object: the next count may succeed
                log.warning("the open jobs cannot be counted: %s", error)
            await asyncio.sleep(JOB_COUNT_SECONDS)

    async def _run(self, pair: Pair) -> None:
        while not self._stopping and not pair.failure():
            try:
                claim = await asyncio.to_thread(self._claimant.claim, self._waiting())
                if claim:
                    await self._own(claim, pair)
                    continue
            except BucketError as error:
                log.warning("jobs wait for the bucket: %s", error)
            except Exception:
                log.exception("jobs: unexpected error; trying again")
            due = [max(0.0, attempts.due - time.monotonic()) for attempts in self._later.values()]
            await self._pause(min([JOB_POLL_SECONDS * (1 + self.store.listed / 1000), *due]))

        if not self._stopping:
            log.warning("no more jobs are taken: %s", pair.failure())

    def _waiting(self) -> set[str]:
        """The jobs whose next attempt is not due."""
        now = time.monotonic()
        return {job_id for job_id, attempts in self._later.items() if attempts.due > now}

    async def _pause(self, seconds: float) -> None:
        """Sleep for `seconds`, or until `wake`."""
        if self._stopping:
            return
        self._woken.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)

    async def _own(self, claim: Claim, pair: Pair) -> None:
        """Work on a job until it ends or another server owns it, or hand it back. Raises BucketError if that fails."""
        about = logs.job_id.set(claim.job_id)  # for every log line from here, also in tasks created here
        log.info("job taken, as owner %d", claim.owner)
        source = self._source = PairSource(pair, self._versions)
        heartbeat = HeartbeatThread(claim, self.settings.lease_seconds)
        work, beats = asyncio.create_task(self._work(claim, source)), asyncio.create_task(heartbeat.until_ended())
        lease = LeaseState.HELD
        try:
            if self._stopping:
                source.stop()
            await asyncio.wait({work, beats}, return_when=asyncio.FIRST_COMPLETED)
            source.stop()
            if beats.done():
                lease = beats.result()
            if lease is not LeaseState.LOST:
                await work  # it writes the finished trajectories
        except (
            asyncio.CancelledError
        ):  # the grace period is over; a thread may still write for a moment, as a late owner would
            work.cancel()
            beats.cancel()
            await asyncio.wait({beats})
            await heartbeat.stopped()
            if lease is not LeaseState.LOST:
                await asyncio.to_thread(claim.release, stopping=True)
            raise
        finally:
            for task in (work, beats):
                task.cancel()
            await asyncio.gather(work, beats, return_exceptions=True)
            self._source = None
            logs.job_id.reset(about)
        await heartbeat.stopped()
        if lease is LeaseState.CANCELLED:
            await asyncio.to_thread(claim.cancelled)
        elif lease is LeaseState.LOST:
            log.info("%s: another server has it", claim.job_id)
        else:
            await asyncio.to_thread(claim.release, stopping=self._stopping or claim.job_id in self._later)

    async def _work(self, claim: Claim, source: PairSource) -> None:
        """Sample and end the job; or return, and the caller hands it back, for a later attempt or another server."""
        record = await asyncio.to_thread(self.store.record, claim.job_id)
        assert record is not None
        before = self._later.pop(claim.job_id, None)
        progress = JobProgress(claim)
        try:
            await asyncio.to_thread(claim.complete, await self._sample(claim, record, source, progress))
            log.info("job completed")
        except Stopped:
            return
        except (ServiceError, BucketError) as error:
            if source.stopping or source.pair.failure():
                return
            fruitless = 0 if progress.brought else 1 + (before.fruitless if before else 0)
            log.warning("job, attempt %d: %s", fruitless, error)
            hopeless = isinstance(error, BucketError) and not error.may_pass
            if (hopeless and (not progress.begun or NEVER_PASSES.search(str(error)))) or fruitless == MOST_JOB_ATTEMPTS:
                return await self._fail(claim, error)
            pause = pause_after(fruitless + 1, FIRST_JOB_PAUSE_SECONDS, LONGEST_JOB_PAUSE_SECONDS)
            self._later[claim.job_id] = Attempts(fruitless, time.monotonic() + pause)
        except Exception as error:
            await self._fail(claim, error)

    async def _sample(
        self, claim: Claim, record: JobRecord, source: PairSource, progress: JobProgress
    ) -> RequestCounts:
        """Fill and seal the job's RUN. Returns the counts of the sealed RUN."""
        problems = await asyncio.to_thread(self._problems, claim.job_id, record, source)
        run = Run(await asyncio.to_thread(self.store.paths.url, record.run), claim.owner)
        source.as_early = await asyncio.to_thread(run.made_early)
        asked = record.model_copy(update={"system_prompt": record.system_prompt or None})
        sampling = SamplingSettings(**asked.model_dump(include=set(SamplingSettings.model_fields)))
        contrast = ContrastSettings(**record.model_dump(include=set(ContrastSettings.model_fields)))
        totals = (
            await sample_problems(problems, run, source, sampling=sampling, contrast=contrast, progress=progress)
        ).totals
        assert totals is not None  # it asked for all shards
        total = len(problems) * record.n
        return RequestCounts(total=total, completed=totals.trajectories, failed=total - totals.trajectories)

    def _problems(self, job_id: str, record: JobRecord, source: PairSource) -> ProblemSet:
        most = self.settings.limits.job_trajectories // record.n
        problems = self.store.problems(job_id, record, most, lambda: source.stopping)
        if len(problems) > most:
            raise ProblemSetError(
                f"{record.problems_url} holds more than {most:,} problems, the most of a job with n {record.n}"
            )
        return problems

    async def _fail(self, claim: Claim, error: Exception) -> None:
        kind = next((name for known, name in ERROR_TYPES.items() if isinstance(error, known)), "internal_error")
        log.error("job failed: %s", error, exc_info=error if kind == "internal_error" else None)
        await asyncio.to_thread(claim.fail, JobError(type=kind, detail=str(error) or repr(error)))

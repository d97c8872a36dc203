"""The sampling stage: a problem set goes in, a sealed RUN comes out, resuming where an earlier attempt stopped.

What the source has answered is written before this ends, be it by an error or by the source's `stop`; a kill -9
loses what had not become a part. Parts are written in the background, several at a time, while sampling goes on, and
an outage of the store is waited out. The source is a server over HTTP for the client and the pair itself for a
server's jobs; the bucket is only waited for in threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from client.errors import RunError, ServiceError, Stopped, TooManyFailures
from client.problems.problem_set import ProblemSet
from client.protocol.requests import (
    PASSING_ERRORS,
    ContrastSettings,
    Failure,
    ModelCard,
    Problem,
    SamplingSettings,
    Trajectory,
)
from client.runs.keys import Key, Keys
from client.runs.run import Run, RunTotals
from client.runs.tables import RunManifest, Sample
from client.sampling.agreement import check_sealed, check_top_k, manifest_of
from client.sampling.shards import WHOLE, Settled, Shard, keys_of, settled
from client.storage.bucket import BucketError

PART_TRAJECTORIES, PART_BYTES = 256, 2**25
PART_SECONDS = 10.0
"""A part is written when it is this large, in memory, or this old: what a kill -9 may cost."""
PARTS_AT_A_TIME = 4
"""On their way to the bucket; sampling waits only beyond these, so that a slow store cannot fill the memory."""
STORE_PAUSE_SECONDS, LONGEST_STORE_PAUSE_SECONDS = 2.0, 60.0
"""Between two attempts at a part while a store is out; doubled each time."""
STORE_PATIENCE_SECONDS = 300.0
STOPPING_POLL_SECONDS = 0.1


class Source(Protocol):
    """What answers problems. Its text (`str`) names it to the user."""

    stopping: bool
    asks_again: bool  # what fails in passing is asked again here; what fails still, has failed

    async def wait_until_ready(self, tell: Callable[[str], None]) -> None:
        """Return when it can answer; `tell` hears what it waits for."""

    async def models(self) -> tuple[ModelCard, ModelCard]:
        """The expert's card and the amateur's."""

    async def tokenizer(self) -> bytes:
        """The expert's tokenizer.json."""

    async def versions(self) -> dict[str, str]:
        """Versions of what its numbers rest on."""

    def trajectories(
        self, problems: Iterable[Problem], sampling: SamplingSettings
    ) -> AsyncIterator[Trajectory | Failure]:
        """Every trajectory of the problems as it completes; ends early, without an error, when `stopping`."""

    def stop(self) -> None:
        """Ask for nothing more; what has been answered still comes."""


class Progress(Protocol):
    """What hears of a run while it goes on."""

    def say(self, text: str) -> None:
        """A line about the whole run."""

    def update(self, counts: Counts) -> None:
        """New counts."""


@dataclass
class Counts:
    """What this attempt has done so far; `written`, `kept` and `steps` are of the parts written."""

    total: int  # trajectories that were missing when it began
    there: int = 0  # trajectories that the RUN held by then
    given_up: int = 0  # and those that had failed for good
    done: int = 0  # answered, of those that were missing
    failed: int = 0
    passing: int = 0  # failed for a reason that may pass, to be asked for again
    tokens: int = 0
    written: int = 0  # of those done
    written_failures: int = 0
    steps: int = 0
    kept: int = 0
    last_failure: Failure | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def settled(self) -> int:
        return self.done + self.failed + self.passing

    @property
    def failures(self) -> int:
        """Of all attempts."""
        return self.given_up + self.failed + self.passing

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


@dataclass(frozen=True)
class Sampled:
    """What `sample` leaves."""

    totals: RunTotals | None  # of the whole RUN; None: other shards are not done, and it is not sealed
    counts: Counts | None  # of this attempt; None: the RUN was sealed already
    waiting: int = 0  # trajectories of other shards that are not done


async def sample(
    problems: ProblemSet,
    run: Run,
    source: Source,
    sampling: SamplingSettings,
    contrast: ContrastSettings,
    progress: Progress,
    shard: Shard = WHOLE,
    retry_failed: bool = False,
    max_failures: int | None = None,
    patience: float = STORE_PATIENCE_SECONDS,
) -> Sampled:
    """Sample what `run` still lacks of this shard of `problems`, write it, and seal the RUN when all shards are done.

    `retry_failed`: what failed in an earlier attempt is lacking too, and opens a RUN that was sealed with it.
    `max_failures`: more than this many failures, of all attempts, end this one. `patience`: seconds that the store may
    be out.

    Raises RunError when the RUN was made with other settings, ServiceError when the source fails, TooManyFailures,
    BucketError when the store does. What was answered by then is in the RUN, but for what BucketError says could not
    be written, and the same call goes on from there.
    """
    if not problems:
        raise RunError(f"no problem was given, so there is nothing to sample into {run}")
    if (completion := await asyncio.to_thread(run.completion)) is not None:
        await asyncio.to_thread(check_sealed, run, problems, sampling, contrast)
        if not (retry_failed and completion["failed"]):
            return Sampled(_totals_in(completion), None)
    await source.wait_until_ready(tell=lambda reason: progress.say(f"waiting for {source}: {reason}"))
    pair, versions = await source.models(), await source.versions()
    manifest = await asyncio.to_thread(manifest_of, problems, pair, versions, sampling, contrast)
    check_top_k(manifest)
    await asyncio.to_thread(run.claim, manifest, await source.tokenizer())
    manifest = await asyncio.to_thread(run.manifest)
    if completion is not None:
        await asyncio.to_thread(run.reopen)
    await asyncio.to_thread(run.mend, manifest)
    mine, n = shard.of(problems), sampling.n
    missing, had, counts = await asyncio.to_thread(_missing, mine, run, n, retry_failed)
    if len(missing) < len(mine):
        progress.say(f"resuming {run}: {len(mine) - len(missing):,} of {len(mine):,} problems are there")
    progress.update(counts)
    writer = Writer(
        run, manifest, problems.question, had, progress.say, lambda: source.stopping, patience, source.asks_again
    )
    ticking = asyncio.create_task(_every_second(writer, counts, progress))
    try:
        if not _too_many(counts, max_failures):
            async for line in source.trajectories(missing, sampling):
                await writer.add(line, counts)
                progress.update(counts)
                if _too_many(counts, max_failures) and not source.stopping:
                    source.stop()
    finally:
        ticking.cancel()
        await writer.close(counts)
        progress.update(counts)
    if _too_many(counts, max_failures):
        last = counts.last_failure
        raise TooManyFailures(
            f"{counts.failures} trajectories failed, more than --max-failures {max_failures}"
            f"{f', the last with {last.type}: {last.detail}' if last else ''}. What was answered is in {run}; mend the "
            "cause and run the same command with --retry-failed"
        )
    if source.stopping:
        raise Stopped(f"stopped; what was answered is in {run}. Run the same command again to go on.")
    if counts.passing:
        raise ServiceError(
            f"{counts.passing} trajectories failed in the server's engines; run the same command again to get them"
        )
    if shard.count > 1 and (waiting := await asyncio.to_thread(_waiting, problems, run, n)):
        return Sampled(None, counts, waiting)
    await asyncio.to_thread(run.mend, manifest)  # what another client left half written
    totals = await asyncio.to_thread(_settled_totals, problems, n, run, manifest)
    if not await asyncio.to_thread(run.seal, totals):  # another client has
        completion = await asyncio.to_thread(run.completion)
        totals = _totals_in(completion) if completion else totals
    return Sampled(totals, counts)


class Writer:
    """Gathers lines into parts and writes them in the background, `PARTS_AT_A_TIME`.

    `settled`: the keys that the RUN holds already; what comes for them again is not written again. `tell` hears of a
    store that is out; it is waited for, `patience` seconds at most, unless everything is to end (`stopping`).
    `asks_again`: as the source's; without it a failure that may pass is counted and not written.
    """

    def __init__(
        self,
        run: Run,
        manifest: RunManifest,
        question: Callable[[str], str | None],
        settled: Container[Key] = frozenset(),
        tell: Callable[[str], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
        patience: float = STORE_PATIENCE_SECONDS,
        asks_again: bool = False,
    ) -> None:
        self._run, self._manifest, self._question, self._settled = run, manifest, question, settled
        self._tell, self._stopping, self._patience, self._asks_again = tell, stopping, patience, asks_again
        self._trajectories: list[Trajectory] = []
        self._failures: list[Failure] = []
        self._bytes = 0
        self._oldest = time.monotonic()
        self._room = asyncio.Semaphore(PARTS_AT_A_TIME)
        self._writing: set[asyncio.Task[None]] = set()
        self._error: Exception | None = None  # why a part could not be written
        self._store_is_out = False

    async def add(self, line: Trajectory | Failure, counts: Counts) -> None:
        """Take a line; start writing when the part is full. Raises what keeps an earlier part from being written."""
        if (line.problem_id, line.sample_index) in self._settled:
            return
        if not self._trajectories and not self._failures:
            self._oldest = time.monotonic()
        if isinstance(line, Trajectory):
            self._trajectories.append(line)
            self._bytes += sum(getattr(line, name).nbytes for name in Trajectory.ARRAYS)
            counts.done += 1
            counts.tokens += len(line.token_ids)
        else:
            counts.last_failure = line
            if line.type in PASSING_ERRORS and not self._asks_again:
                counts.passing += 1
            else:
                self._failures.append(line)
                counts.failed += 1
        if self._error:
            raise self._error
        if len(self._trajectories) + len(self._failures) >= PART_TRAJECTORIES or self._bytes >= PART_BYTES:
            await self._start_writing(counts)

    async def write_what_is_old(self, counts: Counts) -> None:
        """Write the part that is being gathered if it has grown old; for when no line comes."""
        if time.monotonic() - self._oldest > PART_SECONDS:
            await self._start_writing(counts)

    async def close(self, counts: Counts) -> None:
        """Write what is left and wait until it is there; what could not be written before is tried once more.

        Raises what keeps it from being written, which a BucketError does with how much that is. Cancelled, it leaves
        all that to the next call.
        """
        await self._write_all(counts)
        if self._error:
            await self._write_all(counts)
        if isinstance(self._error, BucketError) and (lost := len(self._trajectories)):
            raise BucketError(
                f"{self._error}. {lost} trajectories could not be written and are lost; what {self._run} holds is "
                "kept, and the same command goes on from there"
            ) from self._error
        if self._error:
            raise self._error

    async def _write_all(self, counts: Counts) -> None:
        self._error = None
        await self._start_writing(counts)
        while self._writing:
            await asyncio.wait(self._writing)

    async def _start_writing(self, counts: Counts) -> None:
        """Send what has been gathered on its way, as soon as there is room for another part."""
        await self._room.acquire()
        trajectories, self._trajectories, self._bytes = self._trajectories, [], 0
        failures, self._failures = self._failures, []
        self._oldest = time.monotonic()
        if not trajectories and not failures:
            self._room.release()
            return
        task = asyncio.create_task(self._put(trajectories, failures, counts))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _put(self, trajectories: list[Trajectory], failures: list[Failure], counts: Counts) -> None:
        """Write one part and count its kept steps; what cannot be written is gathered again."""
        try:
            samples = await self._patiently(trajectories, failures)
        except Exception as error:
            self._trajectories[:0], self._failures[:0] = trajectories, failures
            self._error = error
            return
        finally:
            self._room.release()
        counts.written += len(samples)
        counts.written_failures += len(failures)
        for sample in samples:
            counts.steps += max(0, len(sample.token_ids) - self._manifest.first_step)
            counts.kept += len(sample.contrast.steps)

    async def _patiently(self, trajectories: list[Trajectory], failures: list[Failure]) -> list[Sample]:
        """Write one part, again and again while the store is out."""
        pause, until = STORE_PAUSE_SECONDS, time.monotonic() + self._patience
        while True:
            try:
                samples = await asyncio.to_thread(self._write, trajectories, failures)
            except BucketError as error:
                if not error.may_pass or self._stopping() or time.monotonic() > until:
                    raise
                if not self._store_is_out:
                    self._tell(f"{error}; trying again")
                self._store_is_out = True
            else:
                if self._store_is_out:
                    self._tell(f"{self._run} can be written again")
                self._store_is_out = False
                return samples
            for _ in range(round(pause / STOPPING_POLL_SECONDS)):
                if self._stopping():
                    break
                await asyncio.sleep(STOPPING_POLL_SECONDS)
            pause = min(2 * pause, LONGEST_STORE_PAUSE_SECONDS)

    def _write(self, trajectories: list[Trajectory], failures: list[Failure]) -> list[Sample]:
        if failures:
            self._run.write_failures(failures)
        if not trajectories:
            return []
        questions = {line.problem_id: self._question(line.problem_id) for line in trajectories}
        return self._run.write(trajectories, questions, self._manifest)


async def _every_second(writer: Writer, counts: Counts, progress: Progress) -> None:
    """What has to be done though no line comes."""
    while True:
        await asyncio.sleep(1.0)
        progress.update(counts)
        await writer.write_what_is_old(counts)


def _missing(problems: ProblemSet, run: Run, n: int, retry_failed: bool) -> tuple[ProblemSet, Settled, Counts]:
    """The problems of which a trajectory is to be asked for, what is not, the counts to begin with.

    A request cannot name samples, so a problem that lacks one of its n is asked for whole.
    """
    found = settled(run, problems, n)
    if retry_failed:
        found = Settled(found.there, Keys())
    missing = problems
    if len(found):
        missing = problems.only(lambda problem_id: not all((problem_id, index) in found for index in range(n)))
    counts = Counts(total=len(problems) * n - len(found), there=len(found.there), given_up=len(found.failed))
    return missing, found, counts


def _waiting(problems: ProblemSet, run: Run, n: int) -> int:
    """How many trajectories of the whole problem set are neither there nor failed."""
    return len(problems) * n - len(settled(run, problems, n))


def _settled_totals(problems: ProblemSet, n: int, run: Run, manifest: RunManifest) -> RunTotals:
    """The totals of a RUN that may be sealed: every key is there or has failed, as the store tells of it now.

    Raises RunError where it may not.
    """
    tally, failures = run.tally(manifest, problems.ids), run.failures()
    if lost := Keys(key for key in keys_of(problems, n) if key not in tally.keys and key not in failures):
        raise RunError(
            f"{run} lacks {len(lost)} trajectories that were settled before (one is {min(lost)}): the bucket lost "
            "them, or somebody removed them; run the same command again to get them"
        )
    if not tally.keys:
        reason = next(failures[key].detail for key in keys_of(problems, n) if key in failures)
        raise RunError(
            f"every problem failed, so {run} holds nothing: {reason}; mend the cause, then sample with --retry-failed "
            "or into a new RUN"
        )
    return tally.totals(failures)


def _too_many(counts: Counts, max_failures: int | None) -> bool:
    return max_failures is not None and counts.failures > max_failures


def _totals_in(completion: dict[str, Any]) -> RunTotals:
    return RunTotals(**{name: completion[name] for name in RunTotals.__dataclass_fields__})

"""Writes a source's trajectories and failures into a RUN, as parts, in the background.

In: trajectories and failures, one at a time. Out: parts of a RUN, and counts. It waits for an unavailable store.
Everything that was added is written before `close` returns; a kill -9 loses the parts that were not written yet.
Never sends requests to a server.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from client.protocol.requests import PASSING_ERRORS, Failure, Trajectory
from client.retries import retry
from client.runs.keys import Key
from client.runs.manifest import RunManifest
from client.runs.run import Run
from client.runs.samples import Sample
from client.runs.tally import CountedParts
from client.sampling.spool import Spool
from client.storage.bucket import BucketError

Done = TypeVar("Done")

PART_TRAJECTORIES, PART_BYTES = 256, 2**25
PART_SECONDS = 10.0
"""A part is written when it has this many trajectories, this size in memory, or this age; `kill -9` loses unwritten
parts."""
PARTS_AT_A_TIME = 4
"""Parts that are written at the same time. With more, sampling waits, so that a slow store does not fill the memory."""
STORE_PAUSE_SECONDS, LONGEST_STORE_PAUSE_SECONDS = 2.0, 60.0
"""First and longest pause between attempts to write a part to an unavailable store; doubled each time."""
STORE_PATIENCE_SECONDS = 300.0
"""How long to wait for an unavailable store."""


@dataclass
class Counts:
    """Progress of this attempt. Trajectories, if not said otherwise."""

    total: int  # to sample in this attempt
    there: int = 0  # in the RUN when this attempt began
    given_up: int = 0  # failed in earlier attempts and not retried
    done: int = 0  # sampled
    failed: int = 0  # failed for good
    passing: int = 0  # failed for a reason that may pass: the next attempt retries them
    tokens: int = 0  # of the sampled trajectories
    written: int = 0  # sampled and written
    written_failures: int = 0
    steps: int = 0  # of the written trajectories, from first_step on
    kept: int = 0  # of these steps
    last_failure: Failure | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def settled(self) -> int:
        return self.done + self.failed + self.passing

    @property
    def failures(self) -> int:
        """Failures of all attempts together."""
        return self.given_up + self.failed + self.passing

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


class StorePatience:
    """Calls functions that read or write a store, and retries them while the store is unavailable.

    `tell` is called when the store becomes unavailable and when it is back. `seconds`: how long to wait for it;
    `stopping` ends the wait.
    """

    def __init__(
        self,
        run: Run,
        seconds: float = STORE_PATIENCE_SECONDS,
        tell: Callable[[str], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._run, self._seconds, self._tell, self._stopping = run, seconds, tell, stopping
        self._is_out = False

    async def __call__(self, work: Callable[..., Done], *arguments: Any) -> Done:
        """Run `work` in a thread, with retries; returns its result. Raises its last error."""

        def tell_once(error: BaseException) -> None:
            if not self._is_out:
                self._tell(f"{error}; trying again")
            self._is_out = True

        done = await retry(
            lambda: asyncio.to_thread(work, *arguments),
            may_pass=lambda error: isinstance(error, BucketError) and error.may_pass,
            pause=STORE_PAUSE_SECONDS,
            longest_pause=LONGEST_STORE_PAUSE_SECONDS,
            seconds=self._seconds,
            stopping=self._stopping,
            tell=tell_once,
        )
        if self._is_out:
            self._tell(f"{self._run} can be written again")
        self._is_out = False
        return done


class Writer:
    """Collects lines into parts and writes them in the background, `PARTS_AT_A_TIME` at once.

    `settled`: keys that the RUN already has; lines for them are ignored. `tell` is called when the store becomes
    unavailable and when it is back. `patience`: how long to wait for the store, in seconds; `stopping` ends the wait.
    `asks_again`: whether the source retries passing failures itself. If not, they are counted but not written. `spool`:
    keeps results that the store did not accept. `counted`: counts the parts that are written.
    """

    def __init__(
        self,
        run: Run,
        manifest: RunManifest,
        question: Callable[[str], str | None],
        *,
        settled: Container[Key] = frozenset(),
        tell: Callable[[str], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
        patience: float = STORE_PATIENCE_SECONDS,
        asks_again: bool = False,
        spool: Spool | None = None,
        counted: CountedParts | None = None,
    ) -> None:
        self._run, self._manifest, self._question, self._settled = run, manifest, question, settled
        self._store = StorePatience(run, patience, tell, stopping)
        self._asks_again, self._spool, self._counted = asks_again, spool, counted
        self._trajectories: list[Trajectory] = []
        self._failures: list[Failure] = []
        self._bytes = 0
        self._oldest = time.monotonic()
        self._room = asyncio.Semaphore(PARTS_AT_A_TIME)
        self._writing: set[asyncio.Task[None]] = set()
        self._error: Exception | None = None  # why a part could not be written

    async def add(self, line: Trajectory | Failure, counts: Counts) -> None:
        """Add a line; start writing if the part is full. Raises the error of an earlier part that failed."""
        if (line.problem_id, line.sample_index) in self._settled:
            return
        if not self._trajectories and not self._failures:
            self._oldest = time.monotonic()
        if isinstance(line, Trajectory):
            self._trajectories.append(line)
            self._bytes += line.nbytes
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
        """Write the current part if it is older than `PART_SECONDS`."""
        if time.monotonic() - self._oldest > PART_SECONDS:
            await self._start_writing(counts)

    async def close(self, counts: Counts) -> None:
        """Write all that is left, and wait until it is written. Parts that failed before get one more attempt.

        Raises the error with which the last attempt failed; a BucketError says how many trajectories are in the spool,
        or lost. If the call is cancelled, call it again.
        """
        await self._write_all(counts)
        if self._error:
            await self._write_all(counts)
        if isinstance(self._error, BucketError) and (lost := len(self._trajectories)):
            raise BucketError(
                f"{self._error}. {lost} trajectories could not be written and {await self._spooled()}; {self._run} has "
                "the others. Run the same command again to resume",
                self._error.may_pass,
            ) from self._error
        if self._error:
            raise self._error

    async def _spooled(self) -> str:
        """Put the lines that the store refused into the spool; returns, for the error, what became of them."""
        if self._spool is None:
            return "are lost"
        questions = self._questions(self._trajectories)
        try:
            parts = iter(lambda: self._cut(), [])
            await asyncio.to_thread(self._spool.keep, parts, questions, self._failures)
        except (BucketError, OSError) as error:
            return f"are lost, for {self._spool.folder} cannot keep them either: {error}"
        return f"are kept in {self._spool.folder}, from where the same command takes them"

    async def _write_all(self, counts: Counts) -> None:
        self._error = None
        while (self._trajectories or self._failures) and not self._error:
            await self._start_writing(counts)
        while self._writing:
            await asyncio.wait(self._writing)

    async def _start_writing(self, counts: Counts) -> None:
        """Start to write the current part; waits while `PARTS_AT_A_TIME` are being written."""
        await self._room.acquire()
        trajectories = self._cut()
        failures, self._failures = self._failures, []
        self._oldest = time.monotonic()
        if not trajectories and not failures:
            self._room.release()
            return
        task = asyncio.create_task(self._put(trajectories, failures, counts))
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    def _cut(self) -> list[Trajectory]:
        """Remove and return the trajectories of one part. After failed writes, more than those may be waiting."""
        count = size = 0
        for line in self._trajectories[:PART_TRAJECTORIES]:
            count, size = count + 1, size + line.nbytes
            if size >= PART_BYTES:
                break
        part, self._trajectories = self._trajectories[:count], self._trajectories[count:]
        self._bytes = sum(line.nbytes for line in self._trajectories)
        return part

    async def _put(self, trajectories: list[Trajectory], failures: list[Failure], counts: Counts) -> None:
        """Write one part and count its kept steps. If that fails, put its lines back into the current part."""
        try:
            samples = await self._store(self._write, trajectories, failures)
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

    def _write(self, trajectories: list[Trajectory], failures: list[Failure]) -> list[Sample]:
        if failures:
            self._run.write_failures(failures)
        if not trajectories:
            return []
        return self._run.write(trajectories, self._questions(trajectories), self._manifest, self._counted)

    def _questions(self, trajectories: Sequence[Trajectory]) -> dict[str, str | None]:
        return {line.problem_id: self._question(line.problem_id) for line in trajectories}

"""The sampling stage: samples a problem set into a RUN, and resumes where an earlier attempt stopped.

In: problems, a source of trajectories, settings. Out: a sealed RUN. Everything that the source returned is written
before this returns or raises, also after the source's `stop`; `kill -9` loses the parts that were not written yet.
Parts are written in the background, several at a time. The source is a server over HTTP (the client) or the pair itself
(a server's job). Bucket calls run in threads and do not block the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Protocol

from client.errors import LostTrajectories, RunError, ServiceError, Stopped, TooManyFailures
from client.problems.problem_set import ProblemSet
from client.protocol.requests import (
    ContrastSettings,
    Failure,
    PairCards,
    Problem,
    SamplingSettings,
    Trajectory,
)
from client.runs.keys import Keys
from client.runs.manifest import RunManifest
from client.runs.run import Run, RunTotals
from client.runs.tally import CountedParts, Tally
from client.sampling.agreement import check_asked, check_sealed, manifest_of
from client.sampling.shards import WHOLE_SET, Settled, Shard, keys_of, settled
from client.sampling.spool import Spool
from client.sampling.writer import STORE_PATIENCE_SECONDS, Counts, StorePatience, Writer
from client.storage.bucket import BucketError


class TrajectorySource(Protocol):
    """Samples trajectories. `str(source)` is its name in messages."""

    stopping: bool
    asks_again: bool  # it retries passing failures itself; those that it still returns are final

    async def wait_until_ready(self, tell: Callable[[str], None]) -> None:
        """Return when the source can sample. `tell` is called with the reason for waiting."""

    async def models(self) -> PairCards:
        """The expert's card and the amateur's."""

    async def tokenizer(self) -> bytes:
        """The expert's tokenizer.json."""

    async def versions(self) -> dict[str, str]:
        """Versions of the packages that its results depend on."""

    def trajectories(
        self, problems: Iterable[Problem], sampling: SamplingSettings
    ) -> AsyncIterator[Trajectory | Failure]:
        """Every trajectory of the problems as it completes. After `stop` it ends early, without an error."""

    def stop(self) -> None:
        """Send no more requests. Results that have arrived are still returned."""


class Progress(Protocol):
    """Shows the progress of a run."""

    def say(self, text: str) -> None:
        """Show a message about the run."""

    def update(self, counts: Counts) -> None:
        """Show new counts."""


@dataclass(frozen=True)
class Sampled:
    """The result of `sample_problems`."""

    totals: RunTotals | None  # of the whole RUN; None: other shards are not done, so the RUN is not sealed
    counts: Counts | None  # of this attempt; None: the RUN was already sealed
    waiting: int = 0  # trajectories that other shards still lack
    tally: Tally | None = None  # the counts behind the totals; None: the RUN was sealed before, or is not sealed


async def sample_problems(
    problems: ProblemSet,
    run: Run,
    source: TrajectorySource,
    *,
    sampling: SamplingSettings,
    contrast: ContrastSettings,
    progress: Progress,
    shard: Shard = WHOLE_SET,
    retry_failed: bool = False,
    max_failures: int | None = None,
    patience: float = STORE_PATIENCE_SECONDS,
    spool_base: Path | None = None,
) -> Sampled:
    """Sample the trajectories of this shard that `run` lacks, write them, and seal the RUN when all shards are done.

    `retry_failed`: sample the trajectories that failed in earlier attempts too; a sealed RUN is opened for it.
    `max_failures`: stop after more than this many failures, counted over all attempts. `patience`: how long to wait for
    an unavailable store, in seconds. `spool_base`: a local folder for results that the store did not accept in that
    time; the next call writes them to the RUN.

    Raises RunError if the RUN was made with other settings, or its folder holds other files, ServiceError if the source
    fails, BucketError if the store fails, TooManyFailures, or Stopped. The RUN then holds all results, except those
    that a BucketError reports as lost. The same call resumes.
    """
    if not problems:
        raise RunError(f"no problems to sample into {run}: the problem set is empty")
    store = StorePatience(run, patience, progress.say, lambda: source.stopping)
    await store(run.check_place)
    if (completion := await store(run.completion)) is not None:
        await store(check_sealed, run, problems, sampling, contrast)
        if not (retry_failed and completion.totals.failed):
            return Sampled(completion.totals, None)
    await source.wait_until_ready(tell=lambda reason: progress.say(f"waiting for {source}: {reason}"))
    pair, versions = await source.models(), await source.versions()
    today = await store(run.date) or date.today().isoformat()
    manifest = await asyncio.to_thread(manifest_of, problems, pair, versions, sampling, contrast, today)
    check_asked(manifest)
    await store(run.claim, manifest, await source.tokenizer())
    manifest = await store(run.manifest)
    sampling = sampling.model_copy(update={"amateur_prompt": manifest.amateur_prompt, "date": manifest.date})
    if completion is not None:
        await store(run.reopen)
    spool = Spool(spool_base, run, manifest) if spool_base else None
    if spool and (taken := await store(spool.take_up)):
        progress.say(f"{run} has {taken:,} trajectories more, which {spool.folder} had kept for it")
    await store(run.mend, manifest)
    mine, n = shard.of(problems), sampling.n
    missing, had, counts = await store(_missing, mine, run, n, retry_failed)
    if len(missing) < len(mine):
        progress.say(f"resuming {run}: {len(mine) - len(missing):,} of {len(mine):,} problems are complete")
    progress.update(counts)
    writer = Writer(
        run,
        manifest,
        problems.question,
        settled=had,
        tell=progress.say,
        stopping=lambda: source.stopping,
        patience=patience,
        asks_again=source.asks_again,
        spool=spool,
        counted=(counted := CountedParts(manifest, problems.ids)),
    )
    ticking = asyncio.create_task(_every_second(writer, counts, progress))
    refused: BucketError | None = None
    try:
        if not _too_many(counts, max_failures):
            async for line in source.trajectories(missing, sampling):
                try:
                    await writer.add(line, counts)
                except BucketError as error:
                    if spool is None:
                        raise
                    if not refused:
                        source.stop()  # results on their way go to the spool, too
                    refused = error
                progress.update(counts)
                if _too_many(counts, max_failures) and not source.stopping:
                    source.stop()
    finally:
        ticking.cancel()
        await writer.close(counts)
        progress.update(counts)
    if refused:
        raise refused
    if _too_many(counts, max_failures):
        last = counts.last_failure
        raise TooManyFailures(
            f"{counts.failures} trajectories failed, more than --max-failures {max_failures}"
            f"{f', the last with {last.type}: {last.detail}' if last else ''}. {run} keeps what was sampled; fix the "
            "cause and run the same command with --retry-failed"
        )
    if source.stopping:
        raise Stopped(f"stopped; {run} keeps what was sampled. Run the same command again to resume.")
    if counts.passing:
        raise ServiceError(
            f"{counts.passing} trajectories failed in the server's engines; run the same command again to retry them"
        )
    if shard.count > 1 and (waiting := await store(_waiting, problems, run, n)):
        return Sampled(None, counts, waiting)
    await store(run.mend, manifest)  # samples that another client did not write
    totals, tally = await store(_settled_totals, problems, n, run, manifest, counted)
    if not await store(run.seal, totals, tally):  # another client has sealed it
        completion = await store(run.completion)
        totals = completion.totals if completion else totals
    return Sampled(totals, counts, tally=tally)


async def _every_second(writer: Writer, counts: Counts, progress: Progress) -> None:
    """Update the progress and write old parts every second, even if no line arrives."""
    while True:
        await asyncio.sleep(1.0)
        progress.update(counts)
        await writer.write_what_is_old(counts)


def _missing(problems: ProblemSet, run: Run, n: int, retry_failed: bool) -> tuple[ProblemSet, Settled, Counts]:
    """The problems that lack a trajectory, the keys that are settled, and the first counts.

    A request cannot name samples: a problem that lacks one of its n trajectories is requested whole.
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
    """How many trajectories of the whole problem set are neither in the RUN nor failed."""
    return len(problems) * n - len(settled(run, problems, n))


def _settled_totals(
    problems: ProblemSet, n: int, run: Run, manifest: RunManifest, counted: CountedParts
) -> tuple[RunTotals, Tally]:
    """The totals of a RUN that can be sealed, and their tally. Each key must be in the RUN, or have failed.

    Raises RunError if a key is missing, or if every problem failed.
    """
    tally, failures = run.tally(manifest, problems.ids, counted), run.failures()
    if lost := Keys(key for key in keys_of(problems, n) if key not in tally.keys and key not in failures):
        raise LostTrajectories(
            f"{run} lacks {len(lost)} trajectories that it held before (one is {min(lost)}): the bucket lost "
            "them, or somebody removed them. Run the same command again to sample them"
        )
    if not tally.keys:
        reason = next(failures[key].detail for key in keys_of(problems, n) if key in failures)
        raise RunError(
            f"every problem failed, so {run} holds nothing: {reason}; fix the cause, then sample with --retry-failed, "
            "or with other settings into a new RUN"
        )
    return tally.totals(failures), tally


def _too_many(counts: Counts, max_failures: int | None) -> bool:
    return max_failures is not None and counts.failures > max_failures

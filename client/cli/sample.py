"""sample: sends problems to servers and writes their trajectories to a RUN; resumes an earlier attempt.

In: options. Out: a RUN, and a table of its totals. At the first Ctrl-C it waits for the answers on their way and writes
them; a second one ends the process at once. The server's own `sample` uses `fill` too, with another source.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

from client.cli.options import ApiKey, Problems, SamplingOptions, Servers, TargetRun, WorkOptions
from client.cli.program import as_typed
from client.cli.signals import STOP_SIGNALS, heard
from client.errors import Stopped

if TYPE_CHECKING:
    from client.cli.progress import Terminal
    from client.problems.problem_set import ProblemSet
    from client.sampling.sampler import Sampled, TrajectorySource
    from client.sampling.shards import Shard
    from client.servers.client import SamplingClient

SAME_SIGNAL_SECONDS = 1.0


def sample(
    problems: Problems,
    run: TargetRun,
    server: Servers,
    options: SamplingOptions,
    work: WorkOptions,
    api_key: ApiKey = None,
) -> None:
    """Sample PROBLEMS with one or more servers; write trajectories and contrast samples to RUN.

    To resume, run the same command again: it samples only what RUN lacks. A lost or overloaded server is retried with
    growing pauses, for at most --patience seconds.

    A problem that occurs twice (same id; without an id, same question) is sampled once. A row without a question is an
    error.
    """
    from client.servers.client import SamplingClient

    @asynccontextmanager
    async def connected(progress: Terminal) -> AsyncIterator[SamplingClient]:
        def say(text: str) -> None:
            progress.say(as_typed(text, ("patience",)))

        async with SamplingClient(server, api_key, work.patience, say) as connection:
            progress.servers = connection.status
            yield connection

    fill(problems, run, options, work, work.part(), connected)


def fill(
    problems: str,
    run: str,
    options: SamplingOptions,
    work: WorkOptions,
    part: Shard,
    opened: Callable[[Terminal], AbstractAsyncContextManager[TrajectorySource]],
    first: str = "the first request to a server",
) -> None:
    """Sample into RUN from the source that `opened` returns, and print RUN's totals.

    `first`: what sampling begins with, in words for a message. After a stop signal, the exit status is 128 + the
    signal's number. Raises LightReasonerError.
    """
    from client.cli.progress import Terminal, print_labels, print_totals
    from client.runs.run import Run
    from client.sampling.sampler import sample_problems
    from client.sampling.spool import spool_folder

    settings, contrast = options.settings(), options.contrast()
    stopped_by: list[signal.Signals] = []
    stopped_at = -math.inf

    async def sampling() -> Sampled:
        with Terminal() as progress:
            async with opened(progress) as source:
                for number in STOP_SIGNALS:
                    asyncio.get_running_loop().add_signal_handler(number, stop, number, source, progress)
                return await sample_problems(
                    asked,
                    Run(run),
                    source,
                    sampling=settings,
                    contrast=contrast,
                    progress=progress,
                    shard=part,
                    retry_failed=work.retry_failed,
                    max_failures=work.max_failures,
                    patience=work.patience,
                    spool_base=spool_folder(),
                )

    def stop(number: signal.Signals, source: TrajectorySource, progress: Terminal) -> None:
        """Handle a signal: the first one during sampling waits for answers on their way; any other ends at once.

        A SIGTERM within `SAME_SIGNAL_SECONDS` of the first signal is ignored: schedulers send SIGTERM to all processes
        of a job, and scripts pass it on.
        """
        nonlocal stopped_at
        if number == signal.SIGTERM and time.monotonic() - stopped_at < SAME_SIGNAL_SECONDS:
            return
        if progress.began and not source.stopping:
            stopped_by.append(number)
            stopped_at = time.monotonic()
            return source.stop()
        progress.__exit__()
        stop_at_once(
            number,
            f"at once; {run} holds what was written. Run the same command again to resume."
            if progress.began
            else f"before {first}",
        )

    try:
        with ended_early(first):  # until asyncio's handlers replace these
            asked = read_patiently(problems, options, work.patience)
            sampled = asyncio.run(sampling())
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(128 + (stopped_by or [signal.SIGINT])[0])
    if sampled.totals is None:
        print(
            f"shard {part} is done; the other shards lack {sampled.waiting:,} trajectories. "
            f"The shard that ends last completes {run}"
        )
        return
    if sampled.counts is None:
        print(f"{run} is complete: nothing to do")
    print_totals(run, sampled.totals, sampled.counts)
    print_labels(Run(run), sampled.tally)
    if sampled.totals.failed:
        print("to sample them again, run the same command with --retry-failed")


def read_patiently(problems: str, options: SamplingOptions, patience: float) -> ProblemSet:
    """Read the problems. It retries an unavailable bucket for at most `patience` seconds."""
    from client.cli.progress import warn
    from client.retries import retry_blocking
    from client.sampling.writer import STORE_PAUSE_SECONDS
    from client.storage.bucket import BucketError

    deadline = time.monotonic() + patience
    told: set[str] = set()

    def tell_once(error: BaseException) -> None:
        if not told:
            warn(f"{error}; trying again")
        told.add(str(error))

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, BucketError) and error.may_pass and time.monotonic() < deadline

    return retry_blocking(lambda: options.read(problems), may_pass=may_pass, pause=STORE_PAUSE_SECONDS, tell=tell_once)


@contextmanager
def ended_early(first: str) -> Iterator[None]:
    """SIGINT and SIGTERM end the process at once, until other handlers replace these. The message names `first`."""
    before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
    try:
        with heard(lambda number: stop_at_once(number, f"before {first}")):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_once(number: int, when: str) -> None:
    """Print when the process was stopped, and end it with exit status 128 + `number`."""
    print(f"\nstopped {when}", file=sys.stderr, flush=True)
    os._exit(128 + number)  # sys.exit would wait for threads that wait for the bucket

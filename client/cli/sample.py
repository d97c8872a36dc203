"""sample: problems through servers into a RUN, resuming where an earlier attempt stopped.

In: options. Out: a RUN, and a table of what it holds. A first Ctrl-C lets the answers that are on their way be written;
a second ends the process at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli.options import ApiKey, Problems, SamplingOptions, Servers, TargetRun
from client.errors import LightReasonerError, Stopped

if TYPE_CHECKING:
    from client.cli.progress import Terminal
    from client.sampling.sampler import Sampled
    from client.servers.client import SamplingClient

WORK_PANEL = "Shards, failures and outages"
"""A group of options in --help."""


def sample(
    problems: Problems,
    run: TargetRun,
    server: Servers,
    options: SamplingOptions,
    api_key: ApiKey = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            rich_help_panel=WORK_PANEL,
            help="Sample only part I of N of the problems, for example 2/3; other clients sample the others.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            rich_help_panel=WORK_PANEL,
            help="Also sample what failed in earlier attempts, even if RUN is complete.",
        ),
    ] = False,
    max_failures: Annotated[
        int | None,
        typer.Option(min=0, rich_help_panel=WORK_PANEL, help="Stop after more than this many failed trajectories."),
    ] = None,
    patience: Annotated[
        float,
        typer.Option(
            min=0.0,
            rich_help_panel=WORK_PANEL,
            help="Give up after this many seconds in which no server, or not the bucket, responds.",
        ),
    ] = 1800.0,
) -> None:
    """Sample PROBLEMS with one or more servers; write trajectories and contrast samples to RUN.

    To resume, run the same command again: it samples only what RUN lacks. A lost or overloaded server is retried with
    growing pauses, for at most --patience seconds.

    A problem that occurs twice (same id; without an id, same question) is sampled once. A row without a question is an
    error.
    """
    from client.cli.progress import Terminal, print_labels, print_totals
    from client.runs.run import Run
    from client.sampling.sampler import sample_problems
    from client.sampling.shards import Shard
    from client.sampling.spool import spool_folder
    from client.servers.client import SamplingClient

    part = Shard.parse(shard) if shard else Shard()
    if retry_failed and part.count > 1:
        raise LightReasonerError("--retry-failed cannot be combined with --shard: one client retries all failures")
    settings, contrast = options.settings(), options.contrast()
    asked = options.read(problems)

    async def sampling() -> Sampled:
        with Terminal() as progress:
            async with SamplingClient(server, api_key, patience, progress.say) as connection:
                progress.servers = connection.status
                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(number, stop, number, connection, progress)
                return await sample_problems(
                    asked,
                    Run(run),
                    connection,
                    sampling=settings,
                    contrast=contrast,
                    progress=progress,
                    shard=part,
                    retry_failed=retry_failed,
                    max_failures=max_failures,
                    patience=patience,
                    spool_base=spool_folder(),
                )

    def stop(number: signal.Signals, connection: SamplingClient, progress: Terminal) -> None:
        """Once sampling has begun, the first signal lets answers on their way be written; any other ends at once."""
        if progress.began and not connection.stopping:
            stopped_by.append(number)
            return connection.stop()
        progress.__exit__()
        print(
            f"\nstopped at once; {run} holds what was written. Run the same command again to resume."
            if progress.began
            else "\nstopped before the first request to a server",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + number)  # a thread may wait for the bucket for minutes

    stopped_by: list[signal.Signals] = []
    try:
        sampled = asyncio.run(sampling())
    except Stopped as stopped:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(128 + (stopped_by or [signal.SIGINT])[0])
    if sampled.totals is None:
        print(
            f"shard {part} is done; the other shards lack {sampled.waiting:,} trajectories. "
            f"The client that finishes last completes {run}"
        )
        return
    if sampled.counts is None:
        print(f"{run} is complete: nothing to do")
    print_totals(run, sampled.totals, sampled.counts)
    print_labels(Run(run), sampled.tally)
    if sampled.totals.failed:
        print("to sample them again, run the same command with --retry-failed")

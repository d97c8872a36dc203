"""submit, status, wait and cancel: jobs that a server runs by itself, so that the client need not stay connected.

In: options, or a job's id. Out: the job's id, its status, its end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from client.cli.options import ApiKey, JobId, Problems, SamplingOptions, Server, checked
from client.errors import LightReasonerError, Unreachable, clean_lines, one_line
from client.protocol.requests import ENDED, MAX_JOB_PROBLEMS, Job, JobRequest

if TYPE_CHECKING:
    from client.servers.connection import Connection

WAIT_POLL_SECONDS = 1.0
PATIENCE_SECONDS = 600.0
"""How long `wait` retries a server that does not answer: it may be restarting, and jobs outlive servers."""


def submit(
    problems: Problems,
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Where to write: inside the server's bucket, or relative to it.")
    ],
    server: Server,
    options: SamplingOptions,
    api_key: ApiKey = None,
) -> None:
    """Submit a job: the server samples PROBLEMS into RUN by itself. Prints the job's id and returns at once.

    A local file or an hf:// data set is sent with the request. The server itself reads a URL, unless --limit,
    --shuffle, --question-field or --id-field is given.
    """
    from client.problems.hub import HUB

    by_server = not options.chooses and urlsplit(problems).scheme not in ("", HUB)
    asked = None if by_server else options.read(problems, most=MAX_JOB_PROBLEMS + 1)
    if asked and len(asked) > MAX_JOB_PROBLEMS:
        raise LightReasonerError(
            f"{problems} has more than {MAX_JOB_PROBLEMS:,} problems, the most that a request carries: put it into the"
            " server's bucket and name it by its URL"
        )
    request = checked(
        JobRequest,
        problems=None if asked is None else list(asked),
        problems_url=problems if by_server else None,
        run=run,
        **options.fields(),
    )
    print(one_line(_ask(server, api_key, lambda connection: connection.submit(request)).id))


def status(job: JobId, server: Server, api_key: ApiKey = None) -> None:
    """Print a job's status as JSON."""
    print(json.dumps(_ask(server, api_key, lambda connection: connection.job(job)).model_dump(mode="json"), indent=2))


def wait(job: JobId, server: Server, api_key: ApiKey = None) -> None:
    """Wait until a job ends, and show its progress. Exits with 0 only if the job completed."""
    try:
        ended = _ask(server, api_key, lambda connection: _wait(connection, job))
    except KeyboardInterrupt:
        sys.exit(f"\nstopped waiting; job {job} continues on the server")
    print(_line(ended))
    if ended.status != "completed":
        reason = f": {ended.error.detail}".replace("\n", "\n  ") if ended.error else ""
        raise LightReasonerError(f"{job} {ended.status}{reason}")


def cancel(job: JobId, server: Server, api_key: ApiKey = None) -> None:
    """Cancel a job. Its RUN keeps what was written."""
    print(_line(_ask(server, api_key, lambda connection: connection.cancel(job))))


def _ask(server: str, api_key: str | None, question: Callable[[Connection], Awaitable[Job]]) -> Job:
    from client.servers.connection import Connection

    async def ask() -> Job:
        async with aclosing(Connection(server, api_key)) as connection:
            return await question(connection)

    return asyncio.run(ask())


async def _wait(connection: Connection, job_id: str) -> Job:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from client.retries import retry
    from client.servers.window import OUTAGE_SECONDS

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    said: str | None = None  # the last status printed
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(job_id, total=None)

        def say(news: str) -> None:
            console.print(clean_lines(news), highlight=False, markup=False, soft_wrap=True)

        failing_since: float | None = None
        out = False  # whether the user was told that the server does not answer

        def failed(error: BaseException) -> None:
            nonlocal failing_since, out
            failing_since = failing_since or time.monotonic()
            if not out and (quiet := time.monotonic() - failing_since) >= OUTAGE_SECONDS:
                out = True
                say(
                    f"{connection} has not answered for {quiet:.0f} s ({error}). The client retries; it gives "
                    f"up after {PATIENCE_SECONDS:g} s"
                )

        job = await connection.job(job_id)  # at the start, an unreachable server is an error at once
        while job.status not in ENDED:
            counts = job.request_counts
            bar.update(task, description=job.status, completed=counts.completed, total=counts.total or None)
            if not console.is_terminal and job.status != said:
                say(f"{job_id} {job.status}")
                said = job.status
            await asyncio.sleep(WAIT_POLL_SECONDS)
            job = await retry(
                lambda: connection.job(job_id),
                may_pass=lambda error: isinstance(error, Unreachable),
                pause=WAIT_POLL_SECONDS,
                seconds=PATIENCE_SECONDS,
                tell=failed,
            )
            if out:
                say(f"{connection} is back")
            failing_since, out = None, False
        return job


def _line(job: Job) -> str:
    counts = job.request_counts
    return one_line(
        f"{job.id} {job.status}: {counts.completed:,} of {counts.total:,}, {counts.failed:,} failed; {job.run}"
    )

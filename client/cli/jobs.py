"""submit, status, wait and cancel: jobs that a server does by itself, for those who need not stay connected."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from client.cli.options import (
    Alpha,
    ApiKey,
    Beta,
    FirstStep,
    KeepIncomplete,
    Limit,
    MaxTokens,
    N,
    QuestionField,
    Seed,
    Server,
    Shuffle,
    SystemPrompt,
    Temperature,
    TopK,
    TopP,
    check_text,
    checked,
)  # fmt: skip
from client.cli.progress import warn
from client.errors import LightReasonerError, Unreachable
from client.protocol.requests import DEFAULT_TOP_K, ENDED, MAX_JOB_PROBLEMS, SYSTEM_PROMPT, Job, JobRequest
from client.servers.connection import Connection

job_commands = typer.Typer()
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The id that submit printed.")]
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 600.0
"""How long `wait` bears a server that gives no answer: it may be starting again, and jobs outlive servers."""


@job_commands.command()
def submit(
    problems: Annotated[
        str,
        typer.Argument(help="As for sample; a file's URL is read by the server, unless options choose."),
    ],
    run: Annotated[str, typer.Argument(help="Where to write: inside the server's bucket, or relative to it.")],
    server: Server,
    api_key: ApiKey = None,
    limit: Limit = None,
    shuffle: Shuffle = None,
    question_field: QuestionField = None,
    n: N = 1,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_tokens: MaxTokens = 128,
    top_k: TopK = DEFAULT_TOP_K,
    alpha: Alpha = 0.2,
    beta: Beta = 0.4,
    first_step: FirstStep = 1,
    keep_incomplete: KeepIncomplete = False,
    system_prompt: SystemPrompt = SYSTEM_PROMPT,
) -> None:
    """Hand PROBLEMS to a server, which samples them into RUN by itself. Prints the job's id and returns at once."""
    from client.problems.reader import read_problem_set
    from client.problems.rows import HUB

    check_text("--system-prompt", system_prompt)
    drawn = limit is not None or shuffle is not None or question_field is not None
    by_server = not drawn and urlsplit(problems).scheme not in ("", HUB)
    most = MAX_JOB_PROBLEMS + 1 if limit is None else limit
    asked = None if by_server else read_problem_set(
        problems, most, question_field=question_field, shuffle=shuffle, tell=warn
    )  # fmt: skip
    if asked and len(asked) > MAX_JOB_PROBLEMS:
        raise LightReasonerError(
            f"{problems} has more than {MAX_JOB_PROBLEMS:,} problems, the most that a request carries: put it into the"
            " server's bucket and name it by its URL"
        )
    request = checked(
        JobRequest,
        problems=None if asked is None else list(asked),
        problems_url=problems if by_server else None,
        run=run, n=n, temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens, top_k=top_k, alpha=alpha,
        beta=beta, first_step=first_step, keep_incomplete=keep_incomplete, system_prompt=system_prompt or None,
    )  # fmt: skip
    print(_ask(server, api_key, lambda connection: connection.submit(request)).id)


@job_commands.command()
def status(job: JobId, server: Server, api_key: ApiKey = None) -> None:
    """Print a job as the server tells of it, in JSON."""
    print(_ask(server, api_key, lambda connection: connection.job(job)).model_dump_json(indent=2))


@job_commands.command()
def cancel(job: JobId, server: Server, api_key: ApiKey = None) -> None:
    """Cancel a job; what its RUN holds by then stays there."""
    print(_line(_ask(server, api_key, lambda connection: connection.cancel(job))))


@job_commands.command()
def wait(job: JobId, server: Server, api_key: ApiKey = None) -> None:
    """Wait until a job has ended, with progress; exit with 0 only if it completed."""
    try:
        ended = _ask(server, api_key, lambda connection: _wait(connection, job))
    except KeyboardInterrupt:
        sys.exit(f"\nno longer waiting; {job} goes on")
    print(_line(ended))
    if ended.status != "completed":
        reason = f": {ended.error.detail}" if ended.error else ""
        raise LightReasonerError(f"{job} {ended.status}{reason}")


def _ask(server: str, api_key: str | None, question: Callable[[Connection], Awaitable[Job]]) -> Job:
    async def ask() -> Job:
        async with aclosing(Connection(server, api_key)) as connection:
            return await question(connection)

    return asyncio.run(ask())


async def _wait(connection: Connection, job_id: str) -> Job:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    said, patient_until = "", time.monotonic()  # the first answer must come at once
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(job_id, total=None)
        while True:
            try:
                job = await connection.job(job_id)
            except Unreachable as error:
                if time.monotonic() > patient_until:
                    raise
                news = f"{error}; trying again"
            else:
                if job.status in ENDED:
                    return job
                patient_until = time.monotonic() + PATIENCE_SECONDS
                counts = job.request_counts
                bar.update(task, description=job.status, completed=counts.completed, total=counts.total or None)
                news = f"{job_id} {job.status}" if not console.is_terminal else said
            if news != said:
                console.print(said := news, highlight=False, markup=False)
            await asyncio.sleep(POLL_SECONDS)


def _line(job: Job) -> str:
    counts = job.request_counts
    return f"{job.id} {job.status}: {counts.completed:,} of {counts.total:,}, {counts.failed:,} failed; {job.run}"

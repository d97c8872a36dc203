"""The command line of the client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from client.cli.jobs import job_commands
from client.cli.options import (
    Alpha,
    ApiKey,
    Beta,
    FirstStep,
    KeepIncomplete,
    Limit,
    MaxTokens,
    N,
    Patience,
    QuestionField,
    Seed,
    Servers,
    Shuffle,
    SystemPrompt,
    Temperature,
    TopK,
    TopP,
    check_text,
    checked,
)  # fmt: skip
from client.cli.progress import Terminal, warn
from client.contrast import Labels, Selection
from client.errors import LightReasonerError, Stopped
from client.protocol.requests import DEFAULT_TOP_K, SYSTEM_PROMPT, ContrastSettings, SamplingSettings
from client.runs.run import Run, RunTotals
from client.sampling.sampler import Counts, Sampled

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(job_commands)


@app.callback()
def client() -> None:
    """Sample contrast data from a LightReasoner server into a RUN."""


@app.command()
def sample(
    problems: Annotated[
        str,
        typer.Argument(
            help="A .jsonl, .jsonl.gz or .parquet, a problem a row, by path or URL; or hf://NAME?config=…&split=…"
        ),
    ],
    run: Annotated[str, typer.Argument(help="Where to write: a path, file://… or s3://bucket/prefix.")],
    server: Servers,
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
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only this part of PROBLEMS, as 2/3; other clients do the others.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what failed earlier, in a complete RUN too.")
    ] = False,
    max_failures: Annotated[
        int | None, typer.Option(min=0, help="Stop when more than this many trajectories have failed.")
    ] = None,
    patience: Patience = 1800.0,
) -> None:
    """Send PROBLEMS through a server, or several, and write trajectories and contrast samples to RUN.

    A problem that comes twice, with the same id (or, without one, the same question), is asked once; rows without a
    question are refused. Both are named.

    Interrupted, it resumes: the same command does only what is missing. A server that is lost or has no room is asked
    again, ever less often, for as long as --patience.
    """
    from client.problems.reader import read_problem_set
    from client.sampling.sampler import sample as run_sampling
    from client.sampling.shards import Shard
    from client.servers.client import SamplingClient

    part = Shard.parse(shard) if shard else Shard()
    if retry_failed and part.count > 1:
        raise LightReasonerError("--retry-failed goes without --shard: one client retries what all left")
    check_text("--system-prompt", system_prompt)
    settings = checked(
        SamplingSettings,
        max_tokens=max_tokens, n=n, temperature=temperature, top_p=top_p, seed=seed, top_k=top_k,
        system_prompt=system_prompt or None,
    )  # fmt: skip
    contrast = checked(ContrastSettings, alpha=alpha, beta=beta, first_step=first_step, keep_incomplete=keep_incomplete)
    asked = read_problem_set(problems, limit, question_field=question_field, shuffle=shuffle, tell=warn)

    async def sampling() -> Sampled:
        with Terminal() as progress:
            async with SamplingClient(server, api_key, patience, progress.say) as connection:
                progress.servers = connection.status
                for number in (signal.SIGINT, signal.SIGTERM):
                    asyncio.get_running_loop().add_signal_handler(number, stop, number, connection, progress)
                return await run_sampling(
                    asked,
                    Run(run),
                    connection,
                    settings,
                    contrast,
                    progress,
                    part,
                    retry_failed,
                    max_failures,
                    patience,
                )

    def stop(number: signal.Signals, connection: SamplingClient, progress: Terminal) -> None:
        """What is on its way is still written; before there is any, and at a second signal, nothing is waited for."""
        if progress.began and not connection.stopping:
            stopped_by.append(number)
            return connection.stop()
        progress.__exit__()
        print(
            f"\nstopped at once; {run} holds what was written. Run the same command again to go on."
            if progress.began
            else "\nstopped; nothing was asked of a server yet",
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
            f"shard {part} is done; {sampled.waiting:,} trajectories of the others are not. "
            f"Whoever finds all done seals {run}"
        )
        return
    if sampled.counts is None:
        print(f"{run} is complete: nothing to do")
    _print_summary(run, sampled.totals, sampled.counts)
    if sampled.totals.failed:
        print("the same command with --retry-failed asks for them again")


def _print_summary(run: str, totals: RunTotals, counts: Counts | None) -> None:
    table = Table(title=Text(run), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = {
        "problems": f"{totals.problems:,}",
        "trajectories": f"{totals.trajectories:,}",
        "failed": f"{totals.failed:,}",
        "tokens": f"{totals.tokens:,}",
        "steps kept": f"{totals.kept:,} of {totals.steps:,} ({totals.kept_share:.1%})",
        "mean plausible set": f"{totals.mean_plausible_set:.2f} tokens",
        "incomplete sets": f"{totals.incomplete:,}",
        "covered mass": f"{totals.mean_covered_mass:.4f}",
    }
    rows |= {f"KL bound, quantile {q}": f"{value:.3f} nats" for q, value in totals.kl_quantiles.items()}
    if counts:
        rows["this attempt"] = (
            f"{counts.done:,} trajectories in {counts.seconds:.1f} s, {counts.tokens / counts.seconds:,.0f} tokens/s"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    if totals.failed:
        print(f"{totals.failed} trajectories failed; the reasons are in {run}/failures/")
    if not totals.kept:
        remedy = "a larger --top-k proves more sets whole" if totals.incomplete else "a lower --beta keeps more"
        print(f"no step was kept: there is nothing to train on; {remedy}, or another amateur")


def _track(parts: Sequence[str]) -> Iterable[str]:
    console = Console(stderr=True)
    return track(parts, "parts", console=console, disable=not console.is_terminal)


# Commands on RUNs alone, without a server.


@app.command()
def build(
    run: Annotated[str, typer.Argument(help="A RUN with trajectories.")],
    new_run: Annotated[str, typer.Argument(help="Where to write: a path, file://… or s3://bucket/prefix.")],
    alpha: Annotated[float | None, typer.Option(help="Plausible: this share of the best token's probability.")] = None,
    beta: Annotated[float | None, typer.Option(help="Kept: a KL, in nats, proved to be above this.")] = None,
    first_step: Annotated[int | None, typer.Option(help="Steps before this one are never kept.")] = None,
    select: Annotated[Selection | None, typer.Option(help="kl; all steps; or at random, as many as kl keeps.")] = None,
    labels: Annotated[Labels | None, typer.Option(help="contrast; the expert's own; or the token it took.")] = None,
    keep_incomplete: Annotated[
        bool | None, typer.Option(help="Also keep steps whose plausible set is not proved whole.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of --select random.")] = None,
) -> None:
    """Make NEW_RUN from the trajectories in RUN with other settings; needs no server and no GPU.

    What is not given stays as it is in RUN. Interrupted, the same command goes on.
    """
    from client.runs.build import build as make

    source = Run(run)
    given = {
        "alpha": alpha, "beta": beta, "first_step": first_step, "select": select, "labels": labels,
        "keep_incomplete": keep_incomplete, "select_seed": seed,
    }  # fmt: skip
    old = source.manifest().model_dump(include=set(ContrastSettings.model_fields))
    settings = checked(ContrastSettings, **old | {name: value for name, value in given.items() if value is not None})
    if seed is not None and settings.select != "random":
        raise LightReasonerError("--seed: only --select random draws anything")
    built = make(source, Run(new_run), settings, _track)
    _print_summary(new_run, built.totals, None)
    if not built.sealed:
        print(f"{run} is not complete yet; the same command later adds what it will hold")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A RUN with trajectories.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page about RUN: divergences, what other settings would keep, trajectories token by token."""
    from client.report.page import report as page_of

    page = page_of(Run(run))
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise LightReasonerError(f"--output {output} cannot be written: {error.strerror}") from None
    print(f"{output}: {len(page.encode()) / 1e6:.1f} MB, stands alone; open it in a browser")


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="JSONL as the published sampling wrote it, a row a kept step.")],
    run: Annotated[str, typer.Argument(help="Where to write: a path, file://… or s3://bucket/prefix.")],
    tokenizer: Annotated[str, typer.Option(help="The expert's folder; its whole model where one is to train.")],
    alpha: Annotated[float, typer.Option(help="What the file was made with.")] = 0.2,
    beta: Annotated[float, typer.Option(help="What the file was made with, in nats.")] = 0.4,
) -> None:
    """Import the samples of the published implementation into a RUN that can be trained on.

    Such a RUN has no trajectories: build, report and compare need those.
    """
    from client.models.fingerprints import model_folder
    from client.runs.published import import_samples

    settings = checked(ContrastSettings, alpha=alpha, beta=beta)
    imported = import_samples(file, Run(run), model_folder(tokenizer), settings)
    totals, left_out = imported.totals, imported.left_out
    print(f"{run}: {totals.kept:,} kept steps of {totals.trajectories:,} problems")
    if left_out.counts:
        print("\n  ".join((f"left out, {left_out.counts.total():,} rows:", *left_out.lines())))
    if not imported.whole_model:
        print(
            f"{tokenizer} has no weights: lightreasoner-trainer will refuse {run}, for it cannot tell whether its "
            "model is the expert. To train, name a new RUN and give the expert's whole folder"
        )


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="RUNs of the same problems and expert.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Set RUNs side by side: what each amateur, or each choice of settings, keeps and labels."""
    from client.report.compare import compare as figures_of
    from client.report.compare import rows

    compared = figures_of([Run(run) for run in runs])
    if as_json:
        print(json.dumps({"runs": [asdict(figures) for figures in compared]}, indent=2))
        return
    table = Table("")
    for run in runs:
        table.add_column(Text(run), justify="right", overflow="fold")
    for name, cells in rows(compared):
        table.add_row(name, *map(Text, cells))
    Console().print(table)


def main() -> None:
    """Entry point: users' mistakes end in one line, without a traceback."""
    try:
        app()
    except LightReasonerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

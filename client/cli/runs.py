"""report, build, compare, push, pull and import: commands on RUNs that need no server of ours.

In: RUNs, a data set of the Hub, or a file of the published sampling. Out: a page, a new RUN, a table, a copy.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from client.cli.options import (
    ALPHA,
    BETA,
    CONTRAST,
    FIRST_STEP,
    GAMMA,
    KEEP_INCOMPLETE,
    LABELS,
    MAX_SHIFT,
    SOURCE,
    TARGET,
    SourceRun,
    TargetRun,
    checked,
)
from client.contrast import DEFAULT_GAMMA, Labels, Selection
from client.errors import LightReasonerError, one_line
from client.protocol.requests import DEFAULT_KEEP, ContrastSettings

TITLE_BYTES = 4096
"""Bytes at the beginning of the output file that are searched for a report's title."""
DATA_SET = "A data set: hf://datasets/OWNER/NAME, with @REVISION for a branch; to pull, for a commit too."


def report(
    run: SourceRun,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
) -> None:
    """Write an HTML page about RUN: its divergences, what other settings would keep, its trajectories token by token.

    The page is one file without links to others.
    """
    from client.report.page import report_page
    from client.runs.run import Run

    replaced, source = _check_writable(output), Run(run)
    page = report_page(source)
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise LightReasonerError(f"--output {output} cannot be written: {error.strerror}") from None
    print(f"{output}: {len(page.encode()) / 1e6:.1f} MB in one file; open it in a browser")
    if replaced and replaced != str(source):
        print(one_line(f"it replaced the report of another RUN, {replaced}; -o names another file"))


def _check_writable(output: Path) -> str | None:
    """The RUN whose report is there and will be replaced.

    Raises LightReasonerError if the report cannot be written, or would replace a file that is not a report.

    The check comes first, because making the report may take minutes.
    """
    from client.report.page import RUN_MARK, TITLE_MARK

    try:
        is_folder, has_folder = output.is_dir(), output.parent.is_dir()
        head = output.open("rb").read(TITLE_BYTES) if output.is_file() else b""
    except OSError as error:
        raise LightReasonerError(f"--output {output} cannot be written: {error.strerror}") from None
    if is_folder:
        raise LightReasonerError(f"--output {output} cannot be written: a folder; give a file, as {output}/report.html")
    if head and TITLE_MARK.encode() not in head:
        raise LightReasonerError(f"--output {output} exists and is no report, so it stays; give a new name")
    if not has_folder:
        raise LightReasonerError(f"--output {output} cannot be written: no such folder {output.parent}; make it first")
    found = RUN_MARK.search(head.decode(errors="replace"))
    return html.unescape(found[1] or found[2]) if found else None


def build(
    run: SourceRun,
    new_run: Annotated[str, typer.Argument(metavar="NEW_RUN", help=TARGET)],
    alpha: Annotated[float | None, typer.Option(help=ALPHA)] = None,
    beta: Annotated[float | None, typer.Option(help=BETA)] = None,
    first_step: Annotated[int | None, typer.Option(help=FIRST_STEP)] = None,
    select: Annotated[
        Selection | None,
        typer.Option(
            help="Steps to keep: kl, those above --beta; all; random, as many random steps as kl keeps; or top, those "
            "with the highest KL."
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps of --select all that --select top keeps.", show_default=f"{DEFAULT_KEEP:g}"
        ),
    ] = None,
    labels: Annotated[Labels | None, typer.Option(help=LABELS)] = None,
    gamma: Annotated[float | None, typer.Option(help=GAMMA, show_default=f"{DEFAULT_GAMMA:g}")] = None,
    max_shift: Annotated[
        float | None, typer.Option(metavar="NATS", help=f"{MAX_SHIFT} inf removes the bound of RUN.")
    ] = None,
    keep_incomplete: Annotated[bool | None, typer.Option(help=KEEP_INCOMPLETE)] = None,
    select_seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed for --select random.")] = None,
) -> None:
    """Make NEW_RUN from the trajectories of RUN with other settings. Needs no server and no GPU.

    Settings that are not given are those of RUN. To resume, run the same command again.
    """
    from client.cli.progress import print_labels, print_totals, track
    from client.runs.build import build_run
    from client.runs.run import Run

    source = Run(run)
    given = {
        "alpha": alpha, "beta": beta, "first_step": first_step, "select": select, "keep": keep, "labels": labels,
        "gamma": gamma, "max_shift": max_shift, "keep_incomplete": keep_incomplete, "select_seed": select_seed,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if max_shift == math.inf:
        given["max_shift"] = None
    settings = checked(ContrastSettings, **source.manifest().changed(**given))
    if select_seed is not None and settings.select != "random":
        raise LightReasonerError("--seed needs --select random")
    built = build_run(source, Run(new_run), settings, track)
    print_totals(new_run, built.totals, None)
    print_labels(Run(new_run), built.tally)
    if not built.sealed:
        print(f"{run} is not complete yet; run the same command later to add its new trajectories")


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help=f"{SOURCE} All have the same problems and expert.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare RUNs of the same problems and expert: what each amateur, or each choice of settings, keeps and labels."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from client.cli.progress import LABELS_PRINTED, print_odd_labels
    from client.report.compare import compare_runs, comparison_rows
    from client.report.labels import overturns_line
    from client.runs.run import Run

    compared = compare_runs([Run(run) for run in runs])
    if as_json:
        print(json.dumps({"runs": [asdict(figures) for figures in compared]}, indent=2))
        return
    table = Table("")
    for run in runs:
        table.add_column(Text(run), justify="right", overflow="fold")
    for name, cells in comparison_rows(compared):
        table.add_row(Text(one_line(name)), *(Text(one_line(cell)) for cell in cells))
    Console().print(table)
    for figures in compared:
        lines, of = figures.oddest_labels[:LABELS_PRINTED], f" in {figures.run}"
        print_odd_labels(lines, overturns_line(figures.overturns, of), figures.style_warning, of)


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A complete RUN: a path, file://… or s3://bucket/prefix.")],
    place: Annotated[str, typer.Argument(metavar="PLACE", help=DATA_SET)],
) -> None:
    """Copy RUN into a data set of the Hugging Face Hub, as one commit.

    A new data set is created as private. An existing README.md stays, with its licence.
    """
    from client.runs.run import Run
    from client.storage.data_sets import DataSet

    print(Run(run).push(DataSet(place)))


def pull(
    place: Annotated[str, typer.Argument(metavar="PLACE", help=DATA_SET)],
    run: TargetRun,
) -> None:
    """Copy a RUN from a data set of the Hugging Face Hub. To resume, run the same command again."""
    from client.runs.run import Run
    from client.storage.data_sets import DataSet

    copied = Run(run).pull(DataSet(place))
    print(f"{run}: {copied:,} files copied from {place}")


def import_file(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL of the published sampling script, one kept step a row.")
    ],
    run: TargetRun,
    tokenizer: Annotated[
        str,
        typer.Option(
            help="The expert: a folder or a Hugging Face Hub id. To train on RUN, it must hold the weights too."
        ),
    ],
    alpha: Annotated[float, typer.Option(help="The alpha that FILE was made with.")] = CONTRAST.alpha,
    beta: Annotated[float, typer.Option(help="The beta that FILE was made with, in nats.")] = CONTRAST.beta,
) -> None:
    """Import the samples of the published implementation into RUN, for training.

    RUN then has samples but no trajectories, so build, report and compare cannot read it.
    """
    from client.models.fingerprints import model_folder
    from client.runs.published import import_samples
    from client.runs.run import Run

    settings = checked(ContrastSettings, alpha=alpha, beta=beta)
    imported = import_samples(file, Run(run), model_folder(tokenizer), settings)
    totals, left_out = imported.totals, imported.left_out
    print(f"{run}: {totals.kept:,} kept steps of {totals.trajectories:,} problems")
    if left_out.counts:
        print("\n  ".join((f"skipped {left_out.counts.total():,} rows:", *left_out.lines())))
    if not imported.whole_model:
        print(
            f"{tokenizer} has no weights: lightreasoner-trainer will refuse {run}, because it cannot check its model. "
            "To train, import into a new RUN with the expert's whole folder"
        )

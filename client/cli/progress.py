"""The output of the client's commands: progress, totals, warnings.

In: counts and totals. Out: on stderr a progress bar (without a terminal: a line from time to time) with the state of
each server below it, on stdout a table of totals. Never decides anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import rich.progress
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from client.errors import clean_lines, one_line

if TYPE_CHECKING:
    from client.runs.run import Run, RunTotals
    from client.runs.tally import Tally
    from client.sampling.writer import Counts

LABELS_PRINTED = 3
UPDATE_SECONDS = 0.05
"""Least time between two updates of the bar."""
PLAIN_SECONDS = 10.0
"""Time between progress lines, without a terminal."""


def warn(text: str) -> None:
    """Print a line on stderr."""
    Console(stderr=True).print(clean_lines(text), highlight=False, markup=False, soft_wrap=True)


def track(parts: Sequence[str]) -> Iterable[str]:
    """Iterate over parts; shows a progress bar on a terminal."""
    console = Console(stderr=True)
    return rich.progress.track(parts, "parts", console=console, disable=not console.is_terminal)


def print_totals(run: str, totals: RunTotals, counts: Counts | None) -> None:
    """Print a RUN's totals. `counts`: those of the attempt that has just ended, if there was one."""
    from client.report.labels import MANY_CUT, shift_rows

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
    if totals.cut is not None:
        rows["cut at --max-tokens"] = f"{totals.cut:,}"
        rows["without a kept step"] = f"{totals.without_kept_steps:,}"
    rows |= {f"KL bound, quantile {q}": f"{value:.3f} nats" for q, value in totals.kl_quantiles.items()}
    rows |= shift_rows(totals.label_shifts)
    if counts:
        rows["this attempt"] = (
            f"{counts.done:,} trajectories in {counts.seconds:.1f} s, {counts.tokens / counts.seconds:,.0f} tokens/s"
        )
    for name, value in rows.items():
        table.add_row(Text(one_line(name)), value)
    Console().print(table)
    if totals.cut and totals.cut > MANY_CUT * totals.trajectories:
        print(
            f"warning: {totals.cut:,} of {totals.trajectories:,} trajectories were cut at --max-tokens, so nothing is "
            "known of their ends: for whole answers, sample a new RUN with a larger --max-tokens"
        )
    if totals.failed:
        print(f"{totals.failed} trajectories failed; the reasons are in {run}/failures/")
    if not totals.kept:
        remedy = "increase --top-k to prove more plausible sets complete" if totals.incomplete else "lower --beta"
        print(f"no step was kept, so there is nothing to train on: {remedy}, or use another amateur")


def print_labels(run: Run, tally: Tally | None) -> None:
    """Print the labels farthest from the expert, and a warning if labels teach style.

    Prints nothing if `tally` is None, because this attempt did not count the RUN, or if its tokenizer.json is
    unreadable.
    """
    from client.report.labels import (
        overturns_line,
        shown_labels,
        shown_overturns,
        style_warning,
        texts_where_readable,
    )

    if tally is None or not tally.shifts.oddest or (texts := texts_where_readable(run)) is None:
        return
    lines = [str(label) for label in shown_labels(tally.shifts, texts)[:LABELS_PRINTED]]
    warning = style_warning(tally.shifts, texts, tally.manifest.end_token_ids)
    print_odd_labels(lines, overturns_line(shown_overturns(tally.shifts, texts)), warning)


def print_odd_labels(lines: Sequence[str], overturns: str | None, warning: str | None, of: str = "") -> None:
    """Print the labels farthest from the expert, the most common overturns and a warning.

    `of`: words that name the RUN, if there are several.
    """
    if not lines:
        return
    text = "\n  ".join((f"labels farthest from the expert{of}:", *lines))
    for shown in filter(None, (text, overturns, warning and f"warning: {warning}")):
        Console().print(shown, highlight=False, markup=False, soft_wrap=True)


class Terminal:
    """Shows the progress of a run. `servers`: returns each server's state in words; shown if there are several."""

    def __init__(self) -> None:
        self.servers: Callable[[], list[str]] = list
        self.detail = ""  # rates, shares and failures in words
        self._console = Console(stderr=True)
        self._on_terminal = self._console.is_terminal
        self._bar = Bar(self)
        self._task = self._bar.add_task("sampling", total=None, visible=False)
        self._shown = -math.inf
        self._printed = math.inf  # set by the first update: the wait for servers does not count

    @property
    def began(self) -> bool:
        """Whether sampling has begun; before, the run waits for servers and the bucket."""
        return self._printed < math.inf

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(clean_lines(text), highlight=False, markup=False, soft_wrap=True)

    def server_lines(self) -> list[str]:
        """The state of each server; empty for a single server."""
        states = self.servers()
        return states if len(states) > 1 else []

    def update(self, counts: Counts) -> None:
        now = time.monotonic()
        due = now - self._printed > PLAIN_SECONDS
        self._printed = now if due else min(self._printed, now)
        if self._on_terminal:
            if now - self._shown < UPDATE_SECONDS and counts.settled < counts.total:
                return
            self._shown = now
        elif not due:
            return
        seconds = max(counts.seconds, 1e-9)
        self.detail = f"{counts.settled / seconds:,.1f} trajectories/s, {counts.tokens / seconds:,.0f} tokens/s"
        if counts.steps:
            self.detail += f", kept {counts.kept / counts.steps:.1%}"
        if counts.failed + counts.passing:
            self.detail += f", {counts.failed + counts.passing:,} failed"
        self._bar.update(self._task, completed=counts.settled, total=counts.total, visible=True)
        if not self._on_terminal:
            done = f"{counts.settled:,} of {counts.total:,}, {_time_left(counts)}{self.detail}"
            self.say("\n  ".join((done, *self.server_lines())))


def _time_left(counts: Counts) -> str:
    """The estimated time left, from the rate so far; empty before the first trajectory."""
    if not counts.settled:
        return ""
    return f"{timedelta(seconds=round(counts.seconds / counts.settled * (counts.total - counts.settled)))} left, "


class Bar(Progress):
    """The progress bar; below it rates, and a line for each server."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        console = terminal._console
        super().__init__(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from map(Text, filter(None, (self._terminal.detail, *self._terminal.server_lines())))

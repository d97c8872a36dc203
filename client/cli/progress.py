"""How a run's progress looks: a bar on a terminal, a line now and then elsewhere; each server's state below it.

In: counts as they change. Out: text on stderr. Never decides anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from datetime import timedelta

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from client.sampling.sampler import Counts

PLAIN_SECONDS = 10.0
"""Between progress lines where the output is not a terminal."""


def warn(text: str) -> None:
    """Say something beside what a command prints."""
    Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


class Terminal:
    """What hears of a run while it goes on. `servers`: each server's state in words, shown where there are several."""

    def __init__(self) -> None:
        self.servers: Callable[[], list[str]] = list
        self.detail = ""  # rates, shares and failures in words
        self._console = Console(stderr=True)
        self._bar = Bar(self)
        self._task = self._bar.add_task("sampling", total=None, visible=False)
        self._printed = math.inf  # the first update starts the clock: waiting for the server is not progress

    @property
    def began(self) -> bool:
        """Whether the run has begun, and no longer waits for what it needs."""
        return self._printed < math.inf

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def server_lines(self) -> list[str]:
        """The servers' states; of a single one there is nothing to say."""
        states = self.servers()
        return states if len(states) > 1 else []

    def update(self, counts: Counts) -> None:
        seconds = max(counts.seconds, 1e-9)
        self.detail = f"{counts.settled / seconds:,.1f} trajectories/s, {counts.tokens / seconds:,.0f} tokens/s"
        if counts.steps:
            self.detail += f", kept {counts.kept / counts.steps:.1%}"
        if counts.failed + counts.passing:
            self.detail += f", {counts.failed + counts.passing:,} failed"
        self._bar.update(self._task, completed=counts.settled, total=counts.total, visible=True)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._printed > PLAIN_SECONDS:
            done = f"{counts.settled:,} of {counts.total:,}, {_time_left(counts)}{self.detail}"
            self.say("\n  ".join((done, *self.server_lines())))
            self._printed = now
        self._printed = min(self._printed, now)


def _time_left(counts: Counts) -> str:
    """At the rate so far; nothing before there is one."""
    if not counts.settled:
        return ""
    return f"{timedelta(seconds=round(counts.seconds / counts.settled * (counts.total - counts.settled)))} left, "


class Bar(Progress):
    """The bar, and below it what there is to say of the run, and a line for each server."""

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

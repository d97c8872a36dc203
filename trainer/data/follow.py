"""Reads a RUN while it is being written: waits for new parts, until the RUN is sealed.

In: a training set and how long to wait for a part. Out: more examples in the set. Only the first rank lists the
bucket. It tells the other ranks what it found, so that all read the same parts in the same order. Never writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from client.errors import RunError
from client.retries import retry_blocking
from trainer.data.dataset import TrainingSet

PART_POLL_SECONDS = 1.0
REPORT_SECONDS = 60.0
"""Seconds until a wait is first reported. The time doubles with each report."""


class WriterStalled(RunError):
    """The RUN is not sealed, and got no new part within `--follow-timeout`."""


class WaitEnded(Exception):
    """The training was told to stop while it waited for a part."""


class _NothingNew(Exception):
    """No new part yet: the wait goes on."""


class Arrivals:
    """A training set that grows as parts of its RUN appear.

    `agree` gives every rank the value of the first rank; with one rank it returns its argument.
    """

    def __init__(
        self, training_set: TrainingSet, timeout: float, agree: Callable[[Any], Any], leads: bool, console: Console,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self._set = training_set
        self._timeout = timeout
        self._agree = agree
        self._leads = leads
        self._console = console
        self._stopping = stopping

    def more(self) -> bool:
        """Wait until a new part has been read; False once the RUN is sealed and read to its end.

        Raises WriterStalled if no part comes within the timeout, WaitEnded once `stopping` says so on the first rank.
        """
        began, report_at = time.monotonic(), REPORT_SECONDS

        def take() -> bool:
            waited = time.monotonic() - began
            stopping, new, sealed, stalled = self._agree(self._look(waited) if self._leads else None)
            if stopping:
                raise WaitEnded
            for part in new:
                self._set.add(part)
            if new or sealed:
                self._set.sealed = sealed
                return not sealed
            if stalled:
                raise WriterStalled(
                    f"{self._set.run} is not complete and has had no new part for {waited:.0f} s. Check that its client"
                    " still runs: to continue, repeat its 'lightreasoner-client sample' command, and this command with "
                    "--resume. If parts take longer, set a higher --follow-timeout"
                )
            raise _NothingNew

        def report(_: BaseException) -> None:
            nonlocal report_at
            if (waited := time.monotonic() - began) >= report_at:
                said = f"waiting for {self._set.run}: no new part for {waited:.0f} s"
                self._console.print(said, style="yellow", soft_wrap=True)
                report_at *= 2

        return retry_blocking(
            take, may_pass=lambda error: isinstance(error, _NothingNew), pause=PART_POLL_SECONDS, tell=report
        )

    def _look(self, waited: float) -> tuple[bool, list[str], bool, bool]:
        """Whether to stop, new parts, whether the RUN is sealed, whether to give up."""
        # Read before the parts are listed: a sealed RUN gets no more parts.
        sealed = self._set.run.completion() is not None
        known = set(self._set.parts)
        new = [part for part in self._set.run.parts("samples") if part not in known]
        return self._stopping(), new, sealed, waited >= self._timeout

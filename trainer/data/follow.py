"""Reads a RUN while it is being written: new parts as they appear, until it is sealed.

In: a training set and how patient to be. Out: the set, grown. Only the first rank lists the bucket; what it finds is
told to the others, so that all read the same parts in the same order. Never writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from client.errors import RunError
from trainer.data.dataset import TrainingSet

PART_POLL_SECONDS = 1.0
REPORT_SECONDS = 60.0
"""After so long without a new part it is said, and again after twice as long."""


class WriterStalled(RunError):
    """A RUN that is not sealed and has had no new part for longer than one was willing to wait."""


class Arrivals:
    """A training set that grows as parts of its RUN appear.

    `agree` takes what the first rank found and gives it to every rank; with one rank it is the identity.
    """

    def __init__(
        self, training_set: TrainingSet, timeout: float, agree: Callable[[Any], Any], leads: bool, console: Console
    ) -> None:
        self._set = training_set
        self._timeout = timeout
        self._agree = agree
        self._leads = leads
        self._console = console

    def more(self) -> bool:
        """Wait until a new part has been read; False once the RUN is sealed and read to its end.

        Raises WriterStalled when no part has come for the time that was given.
        """
        began, report_at = time.monotonic(), REPORT_SECONDS
        while True:
            waited = time.monotonic() - began
            new, sealed, stalled = self._agree(self._look(waited) if self._leads else None)
            for part in new:
                self._set.add(part)
            if new or sealed:
                self._set.sealed = sealed
                return not sealed
            if stalled:
                raise WriterStalled(
                    f"{self._set.run} is not sealed and has had no new part for {waited:.0f} s. Is its writer gone? "
                    "Let it go on ('lightreasoner-client sample', the same command), and give --resume here, or a "
                    "higher --follow-timeout"
                )
            if waited >= report_at:
                self._console.print(
                    f"waiting for {self._set.run}: no new part for {waited:.0f} s", style="yellow", soft_wrap=True
                )
                report_at *= 2
            time.sleep(min(PART_POLL_SECONDS, max(self._timeout - waited, 0.01)))

    def _look(self, waited: float) -> tuple[list[str], bool, bool]:
        """New parts, whether the RUN is sealed, whether to give up; sealed is asked first, and means that all came."""
        sealed = self._set.run.completion() is not None
        known = set(self._set.parts)
        new = [part for part in self._set.run.parts("samples") if part not in known]
        return new, sealed, waited >= self._timeout

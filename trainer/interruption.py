"""SIGINT and SIGTERM while a training runs: the step under way ends, a checkpoint is written, the program exits.

In: signals. Out: `Interruption.number`, which the training loop reads between steps; `Interrupted`, for the program.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import Any

from client.errors import LightReasonerError

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(LightReasonerError):
    """A training that was told to stop. `exit_code`: 128 + the signal's number, as shells have it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interruption:
    """Notes the first signal, and leaves a second one to end the process at once. A context manager."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._note) for number in STOPPING_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        for meant in STOPPING_SIGNALS:
            signal.signal(meant, signal.SIG_DFL)
        print(
            f"{signal.Signals(number).name}: ends this step and writes a checkpoint; a second signal ends at once",
            file=sys.stderr,
        )

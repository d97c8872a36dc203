"""SIGINT and SIGTERM: a training ends its step and writes a checkpoint, any other work ends at once; the program exits.

In: signals. Out: `Interruption.number`, which the training loop reads between steps; `Interrupted`, for the program;
`ended_by_signals`, for work that keeps all it has done; `run_training`, for a program that waits for a training in a
process of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

from client.cli.signals import STOP_SIGNALS, heard
from client.errors import LightReasonerError

GO_ON = "go on with the same command and --resume"
"""What is said of a training, whether it has a checkpoint or begins anew."""
ONE_SIGNAL_SECONDS = 0.5
"""A terminal and a scheduler signal every process of a command, and so a training twice that a process waits for."""
TOLD_AGAIN_SECONDS = 0.05
LONGEST_SECONDS = 10.0
"""How long a library may take to return, less than schedulers wait before they kill."""


class Interrupted(LightReasonerError):
    """Work that was told to stop. `exit_code`: 128 + the signal's number, as shells have it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interruption:
    """Notes the first signal, and leaves a second one to end the process at once. A context manager."""

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.number:
            return  # the other signal, at the same moment
        self.number = number
        for meant in STOP_SIGNALS:
            signal.signal(meant, signal.SIG_IGN)
        print(
            f"{signal.Signals(number).name}: ends this step and writes a checkpoint; a second signal ends at once",
            file=sys.stderr,
        )
        time.sleep(ONE_SIGNAL_SECONDS)
        for meant in STOP_SIGNALS:
            signal.signal(meant, signal.SIG_DFL)


@contextlib.contextmanager
def ended_by_signals(message: Callable[[], str]) -> Iterator[None]:
    """End what is inside at once, by an exception, where a signal comes; then raise Interrupted with the message.

    A second signal, a moment later or more, ends the process itself, whatever a library waits for; and so does the
    first where the library has not returned `LONGEST_SECONDS` later.
    """
    told: list[int] = []
    first: list[float] = []  # when the first signal was heard
    over = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        if not told:
            told.append(number)
            raise KeyboardInterrupt  # which no library takes for an error of its own

    def leave(number: int) -> None:
        if not over.is_set():
            print(message(), file=sys.stderr, flush=True)
            os._exit(128 + number)

    def insist(number: int) -> None:
        if signal.getsignal(number) is not end:
            return  # a training that this process waits for gets it
        if not first:
            first.append(time.monotonic())
            later = threading.Timer(LONGEST_SECONDS, leave, [number])
            later.daemon = True
            later.start()
        elif time.monotonic() - first[0] > ONE_SIGNAL_SECONDS:
            leave(number)

    def tell_again(unraisable: sys.UnraisableHookArgs) -> None:
        if told and unraisable.exc_type is KeyboardInterrupt:
            threading.Timer(TOLD_AGAIN_SECONDS, os.kill, [os.getpid(), told.pop()]).start()
        else:
            report_unraisable(unraisable)

    # Where a signal falls into a __del__, Python discards what is raised there.
    report_unraisable, sys.unraisablehook = sys.unraisablehook, tell_again
    before = {number: signal.signal(number, end) for number in STOP_SIGNALS}
    try:
        with heard(insist):
            yield
    except BaseException:
        if not told:
            raise
        raise Interrupted(told[0], message()) from None  # a library may have made another error of it
    finally:
        over.set()
        sys.unraisablehook = report_unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def run_training(words: Sequence[str], name: str) -> tuple[int, str]:
    """`lightreasoner-trainer train` with these words, in a process of its own: its exit status and what it complained.

    SIGINT and SIGTERM are passed on to it. Where one came, and the training ended without an error, this raises
    Interrupted, which calls the training by `name`.
    """
    told: list[int] = []
    started: list[subprocess.Popen[str]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        told.append(number)
        print(f"{signal.Signals(number).name}: passed on to the training of {name}", file=sys.stderr)
        for training in started:
            training.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        command = [sys.executable, "-m", "trainer", "train", *words]
        training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started.append(training)
        if told:
            training.send_signal(told[0])
        _, complaint = training.communicate()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told and "error: " not in complaint:
        raise Interrupted(told[0], f"{name}: stopped; the same command goes on from its last checkpoint")
    return training.returncode, complaint

"""SIGINT and SIGTERM: a training finishes its step and writes a checkpoint, other work ends at once; the program exits.

In: signals. Out: `Interruption.number`, which the training loop reads between steps; `Interrupted`, which makes the
program exit; `ended_by_signals`, for work whose finished part is already stored; `run_training`, which runs a training
in a process of its own and passes signals on.
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

GO_ON = "to continue, repeat the command with --resume"
"""Advice after an interrupted training. It also holds without a checkpoint: `--resume` then starts from the beginning.
"""
ONE_SIGNAL_SECONDS = 0.5
"""Signals within this time count as one. A terminal or scheduler signals every process of a command, and
`run_training` passes its own signal on: a training gets both.
"""
TOLD_AGAIN_SECONDS = 0.05
LONGEST_SECONDS = 10.0
"""How long a library may take to return after a signal. Schedulers wait longer before they kill."""


class Interrupted(LightReasonerError):
    """A signal stopped the work. `exit_code`: 128 + the signal's number, the convention of shells."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Interruption:
    """A context manager that records the first signal. A second signal ends the process at once."""

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
            return  # both signals came at the same moment
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
    """A context whose body ends at once when a signal comes, by an exception; raises Interrupted with the message.

    A second signal more than `ONE_SIGNAL_SECONDS` later ends the process, even while a library waits. So does the
    first, if the library has not returned within `LONGEST_SECONDS`.
    """
    told: list[int] = []
    first: list[float] = []  # when the first signal was heard
    over = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        if not told:
            told.append(number)
            raise KeyboardInterrupt  # no library handles it as an error of its own

    def leave(number: int) -> None:
        if not over.is_set():
            print(message(), file=sys.stderr, flush=True)
            os._exit(128 + number)

    def insist(number: int) -> None:
        if signal.getsignal(number) is not end:
            return  # `run_training` passes the signal on
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

    # Python discards an exception that is raised in a __del__: `tell_again` repeats the signal.
    report_unraisable, sys.unraisablehook = sys.unraisablehook, tell_again
    before = {number: signal.signal(number, end) for number in STOP_SIGNALS}
    try:
        with heard(insist):
            yield
    except BaseException:
        if not told:
            raise
        raise Interrupted(told[0], message()) from None  # a library may have replaced the exception
    finally:
        over.set()
        sys.unraisablehook = report_unraisable
        for number, handler in before.items():
            signal.signal(number, handler)


def run_training(words: Sequence[str], name: str) -> tuple[int, str]:
    """Run `lightreasoner-trainer train` with these arguments in its own process. Returns its exit status and stderr.

    Passes SIGINT and SIGTERM on to it. If one came and the training printed no error, raises Interrupted, whose message
    calls the training `name`.
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
        raise Interrupted(told[0], f"{name}: stopped; the same command resumes from its last checkpoint")
    return training.returncode, complaint

"""Lets the server alone end its engines: a signal to all processes must not end them before the server has drained.

Ctrl-C reaches a terminal's whole process group, and service managers often signal every process of a service. vLLM's
engines end at such a signal, at once and with all their requests. So the server starts them with SIGINT and SIGTERM
blocked (`held`), and vLLM calls `register` in each of its processes (the entry point group `vllm.general_plugins`).
From then on these processes ignore the two signals, and end at `STOP` instead.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker

from client.child_errors import tell_parent
from server.watchdog import MARK

STOP = signal.SIGUSR1
"""The signal with which the server ends an engine."""
MEANT_FOR_ALL = frozenset({signal.SIGINT, signal.SIGTERM})


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Processes that this thread starts in this context have both signals blocked from their first instruction."""
    resource_tracker.ensure_running()  # otherwise it starts with the first process, and unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, MEANT_FOR_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def register() -> None:
    """In a process that our server has started for vLLM, and nowhere else: react to STOP alone.

    In any process of vLLM whose parent collects errors (`client.child_errors`): send them to it.
    """
    tell_parent()
    if MARK not in os.environ or multiprocessing.parent_process() is None:
        return
    ending = signal.getsignal(signal.SIGTERM)  # vLLM's own handler, which ends the engine in order
    if callable(ending):
        signal.signal(STOP, ending)
    for number in MEANT_FOR_ALL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANT_FOR_ALL)
    # vLLM would warn of every scheduler that is not its own; ours is a subclass of its own choice.
    logging.getLogger("vllm.config.scheduler").setLevel(logging.ERROR)

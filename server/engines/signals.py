"""Lets the server alone end its engines: what is sent to all processes at once must not end them before it has drained.

Ctrl-C reaches a terminal's whole group of processes, and service managers tend to signal every process of a service.
vLLM's engines end at such a signal, at once and with all that they are working on. So the server starts them with
SIGINT and SIGTERM blocked (`held`), and vLLM calls `register` in each of its processes (the entry point group
`vllm.general_plugins`): there the two are ignored from then on, and `STOP` does what they did.
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
"""What the server sends to an engine that shall end."""
MEANT_FOR_ALL = frozenset({signal.SIGINT, signal.SIGTERM})


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Processes started by this thread meanwhile do not heed what is meant for all, from their first instruction."""
    resource_tracker.ensure_running()  # it is started with the first process otherwise, and unblocks them then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, MEANT_FOR_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def register() -> None:
    """In a process that a server of ours has started for vLLM, and nowhere else: heed STOP alone.

    In any process of vLLM whose parent wants to know why it fails, tell it.
    """
    tell_parent()
    if MARK not in os.environ or multiprocessing.parent_process() is None:
        return
    ending = signal.getsignal(signal.SIGTERM)  # vLLM's own, which ends the engine in good order
    if callable(ending):
        signal.signal(STOP, ending)
    for number in MEANT_FOR_ALL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, MEANT_FOR_ALL)
    # It would warn of every scheduler that is not its own; ours is a subclass of the one that it would take.
    logging.getLogger("vllm.config.scheduler").setLevel(logging.ERROR)

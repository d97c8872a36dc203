"""Reacts to SIGINT and SIGTERM at once, even while a library blocks.

In: a function. Out: calls of it, in a thread, with the number of each signal. Python's own handlers do not run while a
library waits for a store, which may take minutes. Ends no process itself.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def heard(tell: Callable[[int], None]) -> Iterator[None]:
    """Call `tell` with each stop signal that has a Python handler, until asyncio's handlers replace these."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def listen() -> None:
        with os.fdopen(reading, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in STOP_SIGNALS:
                    tell(number[0])

    threading.Thread(target=listen, daemon=True).start()
    woken = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        os.close(writing)

"""SIGINT and SIGTERM, heard at once.

In: a function. Out: its calls, in a thread, with the number of each signal. A library may wait for a store for minutes,
and no handler in Python runs meanwhile. Ends nothing itself.
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
    """Call `tell` with each of these signals that Python handles, until asyncio's handlers take their place."""
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

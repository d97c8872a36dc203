"""Reads several objects side by side: a remote store answers each in the time of a journey.

In: names, and what reads one. Out: what was read, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Found], ahead: int) -> Iterator[Found]:
    """What `read` gives for each item, in order; `ahead` of them are being read while one is used."""
    with ThreadPoolExecutor(ahead) as pool:
        waiting: deque[Future[Found]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

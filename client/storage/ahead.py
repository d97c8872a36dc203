"""Reads several objects in parallel, because each request to a remote store takes a round trip.

In: items, and a function that reads one. Out: the results, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Found = TypeVar("Found")


def read_ahead(items: Iterable[Item], read: Callable[[Item], Found], ahead: int) -> Iterator[Found]:
    """Yield `read(item)` for each item, in order. It reads `ahead` items in parallel, ahead of the caller."""
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

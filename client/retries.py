"""Tries again after errors that may pass, with growing, jittered pauses, up to a limit; a pause can be ended early.

In: what to attempt and which errors may pass. Out: its first result, or its last error unchanged. tenacity does the
work; stamina, which is built on it, cannot end a pause early. How much a server is asked at a time is decided by its
window (`client.servers.window`), not here.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception
from tenacity.stop import stop_after_attempt, stop_after_delay, stop_never

Result = TypeVar("Result")
JITTER = 0.25
"""The largest share of a pause that chance takes away, so that clients that fail together do not return together."""
MOST_DOUBLINGS = 64
STOP_LOOK_SECONDS = 0.1
"""How soon a pause ends once `stopping` returns True."""


async def retry(
    attempt: Callable[[], Awaitable[Result]],
    *,
    may_pass: Callable[[BaseException], bool],
    pause: float,
    longest_pause: float | None = None,
    seconds: float | None = None,
    attempts: int | None = None,
    stopping: Callable[[], bool] = lambda: False,
    tell: Callable[[BaseException], None] = lambda _: None,
) -> Result:
    """Call `attempt`, and call it again while it raises an error that `may_pass`. Returns its result.

    `pause`: seconds after the first error, doubled after each error up to `longest_pause`; constant without one. Chance
    takes up to `JITTER` of each pause. An error with `retry_after` lengthens the pause to that many seconds.
    `seconds`: the last attempt begins no later than this. An error that asks for a longer pause is raised at once.
    `attempts`: the most attempts. `stopping`: ends a pause within `STOP_LOOK_SECONDS`, for one last attempt.
    `tell`: is called with each error that is followed by another attempt.
    """
    by_attempts = stop_never if attempts is None else stop_after_attempt(attempts)
    by_time = stop_never if seconds is None else stop_after_delay(seconds)

    def left(state: RetryCallState) -> float:
        return float("inf") if seconds is None else max(0.0, seconds - (state.seconds_since_start or 0.0))

    def stop(state: RetryCallState) -> bool:
        return stopping() or by_attempts(state) or by_time(state) or _asked_pause(state) > left(state)

    def wait(state: RetryCallState) -> float:
        own = pause_after(state.attempt_number, pause, longest_pause)
        return max(min(own, left(state)), _asked_pause(state))

    retrying = AsyncRetrying(
        retry=retry_if_exception(may_pass),
        stop=stop,
        wait=wait,
        sleep=lambda seconds: rest(seconds, stopping),
        before_sleep=lambda state: tell(_error(state)),
        reraise=True,
    )

    async def awaited() -> Result:  # a coroutine function: tenacity does not await what a lambda returns
        return await attempt()

    return await retrying(awaited)


def retry_blocking(
    attempt: Callable[[], Result],
    *,
    may_pass: Callable[[BaseException], bool],
    pause: float,
    tell: Callable[[BaseException], None] = lambda _: None,
) -> Result:
    """`retry` for code without an event loop. It has no limit: `attempt` raises another error when it gives up."""
    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        wait=lambda state: pause_after(state.attempt_number, pause),
        before_sleep=lambda state: tell(_error(state)),
        reraise=True,
    )
    return retrying(attempt)


def pause_after(failures: int, first: float, longest: float | None = None) -> float:
    """Seconds to pause after this many failures in a row (1 or more): `first`, doubled each time up to `longest`."""
    full = first if longest is None else min(first * 2.0 ** min(failures - 1, MOST_DOUBLINGS), longest)
    return full * random.uniform(1 - JITTER, 1)


async def rest(seconds: float, stopping: Callable[[], bool]) -> None:
    """Sleep for `seconds`, or until `stopping` returns True."""
    until = time.monotonic() + seconds
    while not stopping() and (left := until - time.monotonic()) > 0:  # noqa: ASYNC110 - a bool, not an event
        await asyncio.sleep(min(left, STOP_LOOK_SECONDS))


def _asked_pause(state: RetryCallState) -> float:
    return getattr(_error(state), "retry_after", 0.0)


def _error(state: RetryCallState) -> BaseException:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert error is not None
    return error

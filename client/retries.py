"""Asks again after errors that may pass, with growing, jittered pauses, up to a limit, and stops at once when told.

In: what to attempt and which errors may pass. Out: its first answer, or its last error unchanged. The rules of pauses
and limits are tenacity's; stamina, which stands on it, has no way to end a pause early. What a server can take at a
time is decided elsewhere, by its window.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.stop import stop_after_attempt, stop_after_delay, stop_never

Result = TypeVar("Result")
JITTER = 0.25
"""The share of a pause that chance may take away, so that clients that failed together do not return together."""
MOST_DOUBLINGS = 64
STOP_LOOK_SECONDS = 0.1
"""How soon a pause ends once everything is to stop."""


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
    """What `attempt` returns, tried again while it raises an error that `may_pass`.

    `pause`: seconds after the first error, doubled after each up to `longest_pause`; constant without one. Chance takes
    up to `JITTER` of each. An error's `retry_after` lengthens the pause to as many seconds.
    `seconds`: the last attempt begins no later than that; an error that asks for a longer pause is raised at once.
    `attempts`: at most so many. `stopping`: ends a pause within `LOOK_SECONDS`, for one last attempt.
    `tell`: hears each error after which it tries again.
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

    async def awaited() -> Result:  # tenacity awaits only what it knows to be a coroutine function: no lambda
        return await attempt()

    return await retrying(awaited)


def pause_after(failures: int, first: float, longest: float | None = None) -> float:
    """Seconds to pause after so many failures in a row, at least 1: `first`, doubled each time up to `longest`."""
    full = first if longest is None else min(first * 2.0 ** min(failures - 1, MOST_DOUBLINGS), longest)
    return full * random.uniform(1 - JITTER, 1)


async def rest(seconds: float, stopping: Callable[[], bool]) -> None:
    """Sleep so long, or until everything is to stop."""
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

"""What is asked again, after which pauses, and when that ends."""

import asyncio
import time

import pytest

import client.retries
from client.errors import Busy, Unreachable
from client.retries import JITTER, pause_after, retry, retry_blocking


class Attempts:
    """Fails with these errors, one after the other, and then answers."""

    def __init__(self, *errors):
        self.errors, self.made = list(errors), 0

    async def __call__(self):
        self.made += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made, none of which lasts."""
    made = []

    async def rest(seconds, stopping):
        made.append(seconds)

    monkeypatch.setattr(client.retries, "rest", rest)
    return made


def retried(attempt, **options):
    passing = {"may_pass": lambda error: isinstance(error, Unreachable), "pause": 1.0}
    return asyncio.run(retry(attempt, **passing | options))


def test_an_error_that_may_pass_is_told_and_the_answer_after_it_is_returned(pauses):
    told, errors = [], [Unreachable("first"), Unreachable("second")]
    assert retried(Attempts(*errors), tell=told.append) == "answer"
    assert told == errors and len(pauses) == 2


def test_an_attempt_may_be_any_call_that_can_be_awaited(pauses):
    attempt = Attempts(Unreachable("passes"))
    assert retried(lambda: attempt()) == "answer" and attempt.made == 2


def test_an_error_that_cannot_pass_is_raised_at_once(pauses):
    attempt = Attempts(Unreachable("passes"), ValueError("does not"))
    with pytest.raises(ValueError, match="does not"):
        retried(attempt)
    assert attempt.made == 2


def test_the_last_error_is_raised_after_so_many_attempts(pauses):
    attempt = Attempts(*(Unreachable(str(number)) for number in range(1, 9)))
    with pytest.raises(Unreachable, match="5"):
        retried(attempt, attempts=5)
    assert attempt.made == 5 and len(pauses) == 4


def test_pauses_double_up_to_the_longest_and_chance_shortens_each(pauses):
    retried(Attempts(*[Unreachable("")] * 7), pause=2.0, longest_pause=60.0)
    for made, full in zip(pauses, [2, 4, 8, 16, 32, 60, 60], strict=True):
        assert (1 - JITTER) * full <= made <= full
    assert pauses[5] != pauses[6]


def test_a_pause_is_constant_where_no_longest_is_given_and_never_overflows():
    assert all((1 - JITTER) * 3 <= pause_after(failures, 3.0) <= 3 for failures in (1, 9, 10_000))
    assert pause_after(10_000, 3.0, 60.0) <= 60


def test_the_pause_that_an_error_asks_for_is_kept(pauses):
    retried(Attempts(Busy("full", 17.0), Unreachable("")), seconds=100.0)
    assert pauses[0] == 17.0 and pauses[1] <= 1


def test_an_error_that_asks_for_more_time_than_there_is_is_raised_at_once(pauses):
    attempt = Attempts(Busy("full", 101.0))
    with pytest.raises(Busy):
        retried(attempt, seconds=100.0)
    assert attempt.made == 1 and not pauses


def test_the_last_attempt_begins_when_the_time_is_over():
    attempt, began = Attempts(*[Unreachable("out")] * 99), time.monotonic()
    with pytest.raises(Unreachable):
        retried(attempt, pause=30.0, seconds=0.3)
    assert attempt.made == 2 and 0.3 <= time.monotonic() - began < 5


def test_a_pause_ends_soon_after_everything_is_to_stop_and_one_more_attempt_is_the_last():
    attempt, began = Attempts(*[Unreachable("out")] * 99), time.monotonic()
    with pytest.raises(Unreachable):
        retried(attempt, pause=30.0, stopping=lambda: time.monotonic() - began > 0.2)
    assert attempt.made == 2 and time.monotonic() - began < 5


def test_code_that_does_not_await_waits_until_its_attempt_succeeds_or_gives_up():
    left, told = [Unreachable("first"), Unreachable("second"), ValueError("gave up")], []

    def attempt():
        raise left.pop(0)

    began = time.monotonic()
    with pytest.raises(ValueError, match="gave up"):
        retry_blocking(attempt, may_pass=lambda error: isinstance(error, Unreachable), pause=0.1, tell=told.append)
    assert [str(error) for error in told] == ["first", "second"] and not left
    assert 2 * 0.1 * (1 - JITTER) <= time.monotonic() - began < 5
    assert retry_blocking(lambda: "answer", may_pass=lambda _: True, pause=30.0) == "answer"


def test_a_cancelled_attempt_is_not_made_again():
    async def cancelled():
        attempt = asyncio.create_task(retry(asyncio.Event().wait, may_pass=lambda _: False, pause=1.0))
        await asyncio.sleep(0)
        attempt.cancel()
        await attempt

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancelled())

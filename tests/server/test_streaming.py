"""How much of a request's answer, and of all answers, may wait to be read."""

import asyncio
import contextlib

import pytest
from starlette.requests import ClientDisconnect
from support.runs.made_run import make_trajectory

from client.protocol.requests import TrajectoryRequest
from server.api.streaming import (
    LINE_PIECE_BYTES,
    WAITING_BYTES,
    WINDOW,
    RequestQueue,
    TrajectoryStream,
    UnreadLines,
    window_of,
)


def asked(**fields):
    return TrajectoryRequest(**{"problems": [{"id": "a", "question": "q"}], "top_k": 32, **fields})


@pytest.mark.parametrize("encoding", ["json", "base64"])
def test_a_window_is_bounded_in_lines_and_in_bytes(encoding):
    assert window_of(asked(encoding=encoding)) == WINDOW
    value = {"json": 50, "base64": 16}[encoding]
    long = window_of(asked(max_tokens=20_000, top_k=128, encoding=encoding))
    assert 1 < long < WINDOW and long * 20_000 * 128 * value <= WAITING_BYTES
    assert window_of(asked(max_tokens=1_000_000, top_k=100_000, encoding=encoding)) == 1


def test_given_completions_count_by_their_length():
    problems = [
        {"id": str(index), "question": "q", "token_ids": [1] * (20_000 if index == 1 else 1)} for index in (0, 1)
    ]
    assert window_of(asked(problems=problems, top_k=128)) < WINDOW


LINES = 40


class Reader:
    """Takes the lines of an answer, or stops after the first of them."""

    def __init__(self, queue, unread, stops):
        problems = [{"id": str(index), "question": "q"} for index in range(LINES)]
        queue.enter(LINES)
        self.stream = TrajectoryStream(asked(problems=problems, max_tokens=1, top_k=1), self.trajectory, queue, unread)
        self.lines, self._stops = 0, stops

    async def trajectory(self, problem, index):
        await asyncio.sleep(0.01 * int(problem.id))
        return make_trajectory(problem.id, seed=1, tokens=20)

    async def send(self, message):
        await asyncio.sleep(0)
        self.lines += len(message.get("body", b"")) > 1
        if self._stops and self.lines:
            await asyncio.Event().wait()

    async def read(self):
        async def receive():
            await asyncio.Event().wait()

        await self.stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, self.send)


def test_beyond_the_bound_of_all_lines_the_reader_that_took_none_for_longest_is_cut():
    line = len(make_trajectory("a", seed=1, tokens=20).to_line("json"))

    async def everybody():
        queue, unread = RequestQueue(10 * LINES), UnreadLines(60 * line)
        readers = [Reader(queue, unread, stops) for stops in (True, False, True, False)]  # each that stops holds 39
        ends = [asyncio.ensure_future(reader.read()) for reader in readers]
        await asyncio.wait(ends, timeout=3)
        told = [(reader.lines, end.done() and type(end.exception())) for reader, end in zip(readers, ends, strict=True)]
        held = unread.bytes
        for end in ends:
            end.cancel()
            with contextlib.suppress(asyncio.CancelledError, ClientDisconnect):
                await end
        return told, held, unread.bytes, queue.depth

    told, held, left, depth = asyncio.run(everybody())
    assert (1, ClientDisconnect) in (told[0], told[2]) and told[0][0] == told[2][0] == 1
    assert told[1] == told[3] == (LINES, type(None))
    assert held <= 60 * line and left == 0 and depth == 0


class Held(Reader):
    """Has one line, of so many tokens, after so long."""

    def __init__(self, queue, unread, tokens, seconds, takes):
        queue.enter(1)
        problem = {"id": "a", "question": "q"}
        self.stream = TrajectoryStream(asked(problems=[problem], max_tokens=1, top_k=1), self.trajectory, queue, unread)
        self.bytes, self._tokens, self._seconds, self._takes = 0, tokens, seconds, takes

    async def trajectory(self, problem, index):
        await asyncio.sleep(self._seconds)
        return make_trajectory(problem.id, seed=1, tokens=self._tokens)

    async def send(self, message):
        self.bytes += len(message.get("body", b""))
        if self.bytes >= self._takes:
            await asyncio.Event().wait()


def ends_of(most, readers):
    """Whether each was cut, and the bytes that are still counted."""

    async def everybody():
        queue, unread = RequestQueue(100), UnreadLines(most)
        made = [Held(queue, unread, *reader) for reader in readers]
        ends = [asyncio.ensure_future(reader.read()) for reader in made]
        await asyncio.wait(ends, timeout=1)
        cut = [end.done() and isinstance(end.exception(), ClientDisconnect) for end in ends]
        held = unread.bytes
        for end in ends:
            end.cancel()
            with contextlib.suppress(asyncio.CancelledError, ClientDisconnect):
                await end
        return cut, held, [reader.bytes for reader in made]

    return asyncio.run(everybody())


LARGE = len(make_trajectory("a", seed=1, tokens=20_000).to_line("json"))
NEVER = 10**9


def test_a_line_counts_until_its_last_piece_is_on_its_way():
    cut, held, taken = ends_of(10 * LARGE, [(20_000, 0, 1), (20_000, 0, NEVER)])
    assert cut == [False, False] and held == LARGE and taken == [LINE_PIECE_BYTES, LARGE]


def test_who_waits_for_a_line_that_is_not_there_yet_is_not_the_slowest():
    cut, _, taken = ends_of(LARGE + 10, [(20, 0.5, NEVER), (20_000, 0, 1)])
    assert cut == [False, True] and taken[0]


def test_a_lone_reader_is_not_cut_for_one_line_that_is_larger_than_the_bound():
    cut, held, taken = ends_of(LARGE // 2, [(20_000, 0, NEVER)])
    assert cut == [False] and held == 0 and taken == [LARGE]

"""How much of a request's answer may wait to be read."""

import pytest

from client.protocol.requests import TrajectoryRequest
from server.api.streaming import WAITING_BYTES, WINDOW, window_of


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

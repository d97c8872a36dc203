"""Real engines spread over several workers, on a CPU: what a pair says of itself, and that its answers are the same."""

import httpx
import pytest
from support.models.oracle import Oracle, disagreement
from support.servers.real_server import DEMO, running_server

from client.protocol.requests import parse_line

pytestmark = pytest.mark.long
SPREAD = {
    "tensor parallel": ({"tensor_parallel_size": 2}, 128),
    "data parallel": ({"data_parallel_size": 2}, 256),
}


@pytest.mark.parametrize(("given", "slots"), SPREAD.values(), ids=SPREAD)
def test_engines_of_two_workers_answer_as_those_of_one_do(tmp_path, given, slots):
    body = {"problems": [{"id": str(index), "question": f"What is {index} plus 7?"} for index in range(40)]}
    with running_server(
        DEMO / "expert", DEMO / "amateur", tmp_path, expert_arguments=given, amateur_arguments=given
    ) as server:
        cards = httpx.get(f"{server.url}/v1/models").json()["data"]
        answer = httpx.post(f"{server.url}/v1/trajectories", json={**body, "top_k": 5, "max_tokens": 32}, timeout=300)
    assert [card["slots"] for card in cards] == [slots, slots]
    lines = [line for text in answer.iter_lines() if (line := parse_line(text))]
    assert sorted(int(line.problem_id) for line in lines) == list(range(40))
    for role in ("expert", "amateur"):
        model = Oracle(DEMO / role)
        for line in lines:
            rows, exact = getattr(line, f"{role}_logprobs"), model.logprobs(line.prompt_token_ids, line.token_ids)
            assert disagreement(rows, exact, line.top_ids) <= 2e-4

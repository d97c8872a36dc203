"""Engines spread over several workers, on a CPU: each worker's cores, and what a pair of them says and answers."""

import httpx
import pytest
from support.models.oracle import Oracle, disagreement
from support.servers.real_server import DEMO, running_server

from client.environment import environment
from client.protocol.requests import parse_line
from server.engines.engine import workers_of
from server.settings import cpu_threads


@pytest.mark.parametrize(
    ("given", "cores", "lists"),
    [
        ({"tensor_parallel_size": 2}, "0,1,2,3", [[0, 2], [1, 3]]),
        ({"tensor_parallel_size": 2}, "0", [[0], [0]]),
        ({"pipeline_parallel_size": 2}, "4,5", [[4], [5]]),
    ],
)
def test_vllm_takes_the_cores_of_each_worker(given, cores, lists):
    """It asserts that there is a list for each."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.ompmultiprocessing import OMPProcessManager

    config = AsyncEngineArgs(str(DEMO / "expert"), enforce_eager=True, **given).create_engine_config()
    with environment(cpu_threads(cores, workers_of(given))):
        assert OMPProcessManager(config).cpu_lists == lists
    with environment(cpu_threads(cores)), pytest.raises(AssertionError, match="doesn't match local world size 2"):
        OMPProcessManager(config)


@pytest.mark.long
@pytest.mark.parametrize(("given", "slots"), [({"data_parallel_size": 2}, 256), ({"tensor_parallel_size": 2}, 128)])
def test_engines_of_two_ranks_answer_as_those_of_one_do(given, slots, tmp_path):
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

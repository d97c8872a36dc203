"""How many requests engines run at a time, and how many of them jobs may have. Engines that answer from memory."""

import asyncio

import pytest
from support.servers.real_server import DEMO
from support.servers.stand_in_engines import SLOTS, StandIn, start_pair

from client.protocol.requests import DEFAULT_TOP_K, Problem, SamplingSettings
from server.engines.preflight import inspect_pair
from server.jobs.pair_source import PairSource
from server.settings import ServerSettings


@pytest.fixture
def pair():
    made = start_pair(ServerSettings(), inspect_pair(DEMO / "expert", DEMO / "amateur"), None)
    yield made
    made.shutdown()


@pytest.fixture
def running(monkeypatch):
    """The expert's requests: the parameters of each, and how many ran at a time."""
    seen, own = [], StandIn.run
    now = 0

    async def run(self, prompt_token_ids, params, priority):
        nonlocal now
        if self.role == "amateur":
            return await own(self, prompt_token_ids, params, priority)
        now += 1
        seen.append((params, now))
        answer = await own(self, prompt_token_ids, params, priority)
        now -= 1
        return answer

    monkeypatch.setattr(StandIn, "run", run)
    return seen


def test_a_card_counts_the_slots_of_all_data_parallel_ranks(pair):
    assert pair.card(pair.expert).slots == SLOTS
    pair.expert.llm.vllm_config.parallel_config.data_parallel_size = 3
    assert pair.card(pair.expert).slots == 3 * SLOTS and pair.card(pair.amateur).slots == SLOTS


def test_jobs_fill_three_quarters_of_the_smaller_engines_slots(pair, running):
    pair.expert.llm.vllm_config.parallel_config.data_parallel_size = 3

    async def sample():
        problems = [Problem(id=str(index), prompt_token_ids=[10 + index % 50]) for index in range(3 * SLOTS)]
        source = PairSource(pair, {})
        return [line async for line in source.trajectories(problems, SamplingSettings(max_tokens=250, top_k=4))]

    assert len(asyncio.run(sample())) == 3 * SLOTS
    assert max(now for _, now in running) == 0.75 * SLOTS


def test_the_warm_up_asks_for_the_k_that_requests_ask_for(pair, running):
    """Kernels are compiled for a k: the first request would wait for them."""
    asyncio.run(pair.warm_up())
    assert {params.logprobs for params, _ in running} == {DEFAULT_TOP_K}

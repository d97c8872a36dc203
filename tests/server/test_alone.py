"""The pair as a source that nobody else uses: it fills the engines, asks again itself, and tells of a dead engine.

Engines that answer from memory.
"""

import asyncio

import pytest
from support.servers.real_server import DEMO
from support.servers.stand_in_engines import SLOTS, StandIn, start_pair
from vllm.v1.engine.exceptions import EngineGenerateError

from client.protocol.requests import Failure, Problem, SamplingSettings
from client.servers.dispatch import ATTEMPTS
from server.engines.preflight import inspect_pair
from server.jobs.pair_source import EngineDied, PairSource
from server.settings import ServerSettings

SAMPLING = SamplingSettings(max_tokens=20, top_k=4)


@pytest.fixture
def alone():
    pair = start_pair(ServerSettings(), inspect_pair(DEMO / "expert", DEMO / "amateur"), None)
    yield PairSource(pair, {}, alone=True)
    pair.shutdown()


def lines(source, count):
    async def sample():
        problems = [Problem(id=str(index), prompt_token_ids=[10 + index % 50]) for index in range(count)]
        return [line async for line in source.trajectories(problems, SAMPLING)]

    return asyncio.run(sample())


def test_it_asks_for_twice_what_the_engines_run(alone, monkeypatch):
    own, now, most = PairSource._answer, 0, 0

    async def answer(self, *asked):
        nonlocal now, most
        now += 1
        most = max(most, now)
        line = await own(self, *asked)
        now -= 1
        return line

    monkeypatch.setattr(PairSource, "_answer", answer)
    assert len(lines(alone, 3 * SLOTS)) == 3 * SLOTS
    assert most == 2 * SLOTS


@pytest.mark.parametrize(("failing", "failed"), [(ATTEMPTS - 1, False), (ATTEMPTS, True)])
def test_what_fails_in_an_engine_is_asked_again_as_often_as_a_client_does(alone, monkeypatch, failing, failed):
    own, asked = StandIn.run, 0

    async def run(self, prompt, params, priority):
        nonlocal asked
        if self.role == "expert" and prompt == [13]:
            asked += 1
            if asked <= failing:
                raise EngineGenerateError("a fault")
        return await own(self, prompt, params, priority)

    monkeypatch.setattr(StandIn, "run", run)
    found = {line.problem_id: line for line in lines(alone, 6)}
    assert len(found) == 6 and asked == min(failing + 1, ATTEMPTS)
    assert [name for name, line in found.items() if isinstance(line, Failure)] == (["3"] if failed else [])


def test_a_dead_engine_ends_it_and_no_problem_is_blamed(alone, monkeypatch):
    own = StandIn.run

    async def run(self, prompt, params, priority):
        if prompt == [13]:
            self.llm.errored, self._hung = True, "it is dead"
            raise EngineGenerateError("no answer")
        return await own(self, prompt, params, priority)

    monkeypatch.setattr(StandIn, "run", run)
    with pytest.raises(EngineDied, match="expert's engine died: it is dead") as died:
        lines(alone, 6)
    assert died.value.may_pass

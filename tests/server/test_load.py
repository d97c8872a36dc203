"""Many at once: nothing is lost, nothing differs, and what was used is given back. The demo pair in float32."""

import asyncio
import os
import random
import time
from pathlib import Path

import httpx
import pytest
from support.models.oracle import Oracle, first_tie
from support.servers.real_server import DEMO
from support.servers.restarting import QUEUED
from word_problems import rows

from client.protocol.requests import Failure, parse_line
from server.api.streaming import WINDOW

REQUESTS, DISTINCT = 500, 50
FIELDS = {"max_tokens": 48, "top_k": 8, "encoding": "base64"}


@pytest.fixture(scope="module")
def requests():
    """500 problems of 50 questions, each with an id of its own."""
    questions = [row["question"] for row in rows("dev", DISTINCT)]
    return [{"id": f"r{index}", "question": questions[index % DISTINCT]} for index in range(REQUESTS)]


@pytest.fixture(scope="module")
def solo(demo_server, requests):
    """Each question's trajectory when it is the only one."""
    found = {}
    with httpx.Client(timeout=60) as http:
        for problem in requests[:DISTINCT]:
            answer = http.post(f"{demo_server.url}/v1/trajectories", json={"problems": [problem], **FIELDS})
            found[problem["question"]] = parse_line(answer.content)
    return found


def check_each_equals_its_solo_run(lines, requests, solo):
    assert sorted(line.problem_id for line in lines) == sorted(problem["id"] for problem in requests)
    expert, question = Oracle(DEMO / "expert"), {problem["id"]: problem["question"] for problem in requests}
    for line in lines:
        assert not isinstance(line, Failure), line
        alone = solo[question[line.problem_id]]
        if line.token_ids.tolist() != alone.token_ids.tolist():
            certain = first_tie(expert, alone)
            assert line.token_ids[:certain].tolist() == alone.token_ids[:certain].tolist()


async def post(http, server, problem):
    """A small request, asked again as the server says while it has no room: (line, refusals)."""
    refusals = 0
    while True:
        answer = await http.post(f"{server.url}/v1/trajectories", json={"problems": [problem], **FIELDS})
        if answer.status_code != 429:
            assert answer.status_code == 200, answer.text
            return parse_line(answer.content), refusals
        refusals += 1
        await asyncio.sleep(float(answer.headers["retry-after"]) * random.uniform(1, 1.2))


async def post_all(server, requests):
    async with httpx.AsyncClient(
        timeout=120, headers=server.headers, limits=httpx.Limits(max_connections=None)
    ) as http:
        return await asyncio.gather(*(post(http, server, problem) for problem in requests))


def test_500_at_once_each_get_what_they_get_alone(demo_server, requests, solo):
    answers = asyncio.run(post_all(demo_server, requests))
    check_each_equals_its_solo_run([line for line, _ in answers], requests, solo)
    assert sum(refusals for _, refusals in answers) == 0


def test_a_full_queue_refuses_with_a_time_and_those_who_wait_it_out_all_finish(service, requests, solo):
    many = requests[: 4 * QUEUED]
    answers = asyncio.run(post_all(service, many))
    check_each_equals_its_solo_run([line for line, _ in answers], many, solo)
    assert sum(refusals for _, refusals in answers) > 0
    assert service.metric("lightreasoner_queue_depth") == 0


def test_a_request_that_could_never_enter_is_not_told_to_wait(service, requests):
    answer = service.ask("POST", "/v1/trajectories", json={"problems": requests[: QUEUED + 1], **FIELDS})
    assert answer.status_code == 422 and answer.json()["errors"][0]["field"] == "problems"


def test_a_request_larger_than_its_window_is_answered_whole(demo_server, requests):
    assert len(requests) > WINDOW
    body = {"problems": requests, **FIELDS, "max_tokens": 2}
    answer = httpx.post(f"{demo_server.url}/v1/trajectories", json=body, timeout=60)
    assert {parse_line(line).problem_id for line in answer.iter_lines()} == {problem["id"] for problem in requests}


def resident_bytes(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def read_badly(server, problems, how):
    """A reader that takes its time, or goes away after the first bytes. Returns what it read."""
    body = {"problems": problems, "max_tokens": 200, "top_k": 110, "temperature": 1.0, "n": 16, "encoding": "json"}
    text = b""
    async with (
        httpx.AsyncClient(timeout=120) as http,
        http.stream("POST", f"{server.url}/v1/trajectories", json=body) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for chunk in answer.aiter_raw(1024):
            text += chunk
            if how == "vanishing":
                return text
            if len(text) < 40_000:
                await asyncio.sleep(0.1)
    return text


def test_slow_and_vanishing_readers_harm_nobody_and_leave_nothing_behind(demo_server, requests, solo):
    hows = ["slow", "vanishing"] * 25

    async def everybody():
        readers = [read_badly(demo_server, [problem], how) for problem, how in zip(requests, hows, strict=False)]
        return await asyncio.gather(post_all(demo_server, requests[:100]), *readers)

    asyncio.run(everybody())  # once, so that what is allocated once is allocated
    before = resident_bytes(demo_server.process.pid)
    answers, *read = asyncio.run(everybody())
    check_each_equals_its_solo_run([line for line, _ in answers], requests[:100], solo)
    for how, text in zip(hows, read, strict=True):
        whole = [line for line in text.split(b"\n")[:-1] if line]  # a blank one says that the server lives
        assert len(whole) == 16 if how == "slow" else len(whole) < 16
    busy = ("lightreasoner_queue_depth", "vllm:num_requests_running", "vllm:num_requests_waiting")
    deadline = time.monotonic() + 60
    while any(map(demo_server.metric, busy)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [demo_server.metric(name) for name in busy] == [0, 0, 0]
    # One round holds 25 slow readers x 16 lines of about 0.3 MB: keeping them would show.
    assert resident_bytes(demo_server.process.pid) - before < 60e6

"""What the client bears of a server, and what it does not: a real HTTP server from memory, at times behind a proxy."""

import asyncio
import dataclasses
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import httpx
import pytest
from contract_server import ContractServer, line_of, refusal
from proxy import Proxy
from real_server import free_port
from sampled import PROBLEMS, keys, more, once, sampled

import client.connection
import client.servers
from client.errors import ServiceError
from client.protocol import Decoding, Failure, Problem, Trajectory

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.fixture
def server():
    with ContractServer().running() as server:
        yield server


@pytest.fixture
def proxy(server):
    with Proxy(server.port).running() as proxy:
        yield proxy


def posts(refusals):
    """Refuses the first requests for trajectories with these answers, one after the other."""

    def refuse(request):
        return refusals.pop(0) if request.method == "POST" and refusals else None

    return refuse


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_refusal_that_may_pass_is_borne_and_every_problem_is_answered_once(server, status):
    server.refuse = posts([refusal(status, "not now") for _ in range(9)])
    lines = sampled(server.url)
    assert keys(lines) == once(PROBLEMS) and all(isinstance(line, Trajectory) for line in lines)
    assert sorted(chain.from_iterable(server.asked)) == sorted(problem.id for problem in PROBLEMS)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refusal_that_cannot_pass_ends_the_run_with_the_servers_own_words(server, status):
    refusals = [refusal(status, "the third problem is no problem")]
    server.refuse = posts(refusals)
    with pytest.raises(ServiceError, match="refused the request: the third problem is no problem"):
        sampled(server.url, PROBLEMS[:16])
    assert server.asked == [] and not refusals  # it was asked once


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_a_server_asks_for_is_kept(server, monkeypatch, form):
    """The pause is read off the client's own sleep, so nothing waits for it."""
    slept, sleep = [], asyncio.sleep

    async def short(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client.servers.asyncio, "sleep", short)
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 70))
    server.refuse = posts([refusal(429, "full", retry_after="70" if form == "seconds" else later)])
    assert keys(sampled(server.url)) == once(PROBLEMS)
    assert 60 < max(slept) <= 70


def test_a_stream_that_is_cut_in_the_middle_of_a_line_costs_only_what_was_missing(server, proxy):
    proxy.cut_after = 5000  # four lines and some
    lines = sampled(proxy.url, PROBLEMS[:40])
    assert keys(lines) == once(PROBLEMS[:40]) and proxy.cuts > 5
    first = lines[0].problem_id
    assert sum(batch.count(first) for batch in server.asked) == 1  # what was had is not asked for again


def test_a_torn_last_line_of_a_stream_that_ended_regularly_is_no_line(server):
    """As where a proxy between closes both sides politely."""
    torn = []

    def line(problem, index):
        whole = line_of(problem, index)
        if problem["id"] == "p3" and not torn:
            torn.append(problem)
            return whole[: len(whole) // 2]
        return whole

    server.line = line
    assert keys(sampled(server.url, PROBLEMS[3:4])) == once(PROBLEMS[3:4]) and torn
    assert server.asked == [["p3"], ["p3"]]


def test_a_server_that_is_killed_and_started_again_costs_only_a_retry():
    port = free_port()
    script = Path(__file__).parent.parent / "contract_server.py"
    processes, told = [], []

    def start():
        processes.append(subprocess.Popen([sys.executable, script, str(port)]))

    def kill_once(lines):
        if len(lines) == 20:
            processes[0].kill()
            processes[0].wait()
            threading.Thread(target=start).start()

    try:
        start()
        url = f"http://127.0.0.1:{port}"
        until_it_listens(url)
        lines = sampled(url, on_line=kill_once, problems=[*PROBLEMS, *more(1000)], tell=told.append)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert keys(lines) == once([*PROBLEMS, *more(1000)])
    assert len(processes) == 2 and any("trying again" in said for said in told) and told[-1] == f"{url} is back"


def until_it_listens(url):
    for _ in range(600):
        try:
            return httpx.get(f"{url}/ready")
        except httpx.HTTPError:
            time.sleep(0.05)
    raise AssertionError(f"no server at {url}")


def test_no_progress_ends_in_an_error_that_says_how_to_go_on_after_all_that_was_answered(server, proxy):
    had = []

    def refuse_from_now_on(lines):
        had[:] = lines
        if len(lines) == 10:
            proxy.refusing = True
            proxy.cut()

    with pytest.raises(
        ServiceError, match=r"gave up, for nothing was answered for 3 s .*same command goes on"
    ) as error:
        sampled(proxy.url, more(2000), patience=3, on_line=refuse_from_now_on)
    assert proxy.url in str(error.value)
    assert len(had) >= 10 and max(keys(had).values()) == 1


def test_error_lines_that_may_pass_are_asked_again_a_bounded_number_of_times(server):
    seen = Counter()

    def line(problem, index):
        seen[problem["id"]] += 1
        fails = {"p1": 2, "p2": 100}.get(problem["id"], 0)
        if seen[problem["id"]] <= fails:
            return Failure(problem["id"], index, "no_scores", "dropped").to_line()
        return line_of(problem, index)

    server.line = line
    lines = {line.problem_id: line for line in sampled(server.url, PROBLEMS[:5])}
    assert isinstance(lines["p1"], Trajectory) and seen["p1"] == 3
    assert isinstance(lines["p2"], Failure) and lines["p2"].type == "no_scores" and seen["p2"] == 4
    assert seen["p0"] == seen["p3"] == 1


def test_a_final_error_line_is_not_asked_again(server):
    (line,) = sampled(server.url, [Problem(id="long", question="unanswerable")])
    assert line.type == "context_length_exceeded" and server.asked == [["long"]]


def test_a_server_that_stops_says_nothing_of_its_problems_however_often(server):
    count = 0

    def line(problem, index):
        nonlocal count
        count += 1
        return (
            Failure(problem["id"], index, "server_stopping", "bye").to_line() if count < 12 else line_of(problem, index)
        )

    server.line = line
    assert [type(line) for line in sampled(server.url, PROBLEMS[:1])] == [Trajectory]


def test_of_several_trajectories_a_problem_each_is_had_once_though_it_is_asked_for_whole(server, proxy):
    proxy.cut_after = 6000

    def mend(lines):
        if len(lines) == 10:
            proxy.cut_after = None

    lines = sampled(proxy.url, PROBLEMS[:10], Decoding(n=8, temperature=1.0), on_line=mend)
    assert keys(lines) == once(PROBLEMS[:10], 8) and proxy.cuts > 2
    assert all(len(batch) <= 2 for batch in server.asked)  # a request is 16 trajectories, not 16 problems


def test_a_server_that_fails_after_its_last_line_is_not_waited_for(server):
    """What is complete is complete, though the last request did not end well."""

    async def fail_for_good():
        server.refuse = lambda request: refusal(503, "gone", retry_after="1000")
        raise ConnectionResetError

    server.after_lines = fail_for_good
    lines = sampled(server.url, PROBLEMS[:1])
    assert keys(lines) == once(PROBLEMS[:1])


def test_the_client_gives_up_on_a_silent_server_and_asks_again(server, monkeypatch):
    """Heartbeats come every 10 s; a server that sends neither is dead, though its connection stands."""
    monkeypatch.setattr(client.connection, "READ_TIMEOUT_SECONDS", 0.5)
    hung = []

    async def hang_once():
        if not hung:
            hung.append(True)
            await asyncio.Event().wait()

    server.before_line = hang_once
    assert keys(sampled(server.url, PROBLEMS[:3])) == once(PROBLEMS[:3]) and len(server.asked) == 2


def test_trajectories_are_the_servers_own(server):
    (line,) = sampled(server.url, PROBLEMS[:1])
    problem = {"id": "p0", "question": PROBLEMS[0].question}
    assert dataclasses.replace(line).to_line("base64") == line_of(problem, 0)

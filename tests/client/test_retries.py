"""What the client bears of a server, and what it does not: a real HTTP server from memory, at times behind a proxy."""

import asyncio
import base64
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import chain

import httpx
import numpy as np
import orjson
import pytest
from starlette.responses import Response
from support.processes.forked import PATH, ROOT
from support.runs.made_run import make_trajectory
from support.runs.sampled import PROBLEMS, keys, more, once, sampled
from support.servers.contract_server import ContractServer, line_of, refusal
from support.servers.proxy import Proxy
from support.servers.real_server import free_port

import client.servers.client
import client.servers.connection
import client.servers.dispatch
import client.servers.window
from client.errors import ServiceError
from client.protocol.requests import Failure, Problem, SamplingSettings, Trajectory, parse_line
from client.servers.client import SamplingClient

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
    with pytest.raises(ServiceError, match="rejected the request: the third problem is no problem"):
        sampled(server.url, PROBLEMS[:16])
    assert server.asked == [] and not refusals  # it was asked once


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_pause_that_a_server_asks_for_is_kept(server, monkeypatch, form):
    """The pause is read off the client's own sleep, so nothing waits for it."""
    slept, sleep = [], asyncio.sleep

    async def short(seconds):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client.servers.window.asyncio, "sleep", short)
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


def changed(**fields):
    """A line with some of its fields changed."""

    def change(line):
        whole = orjson.loads(line)
        return orjson.dumps({name: value for name, value in (whole | fields).items() if value != "gone"}) + b"\n"

    return change


def array(change, **fields):
    """A line with one of its arrays changed, sent as JSON."""

    def changed_array(line):
        whole = parse_line(line)
        values = {name: getattr(whole, name).tolist() for name in Trajectory.ARRAYS}
        ((name, value),) = fields.items()
        change(values[name], value)
        return orjson.dumps(orjson.loads(line) | values) + b"\n"

    return changed_array


def first(values, value):
    if isinstance(values[0], list):
        values[0][0] = value
    else:
        values[0] = value


def cut(values, value):
    del values[value:]


def packed(name, number):
    """A line whose first value of an array is a number that JSON has no word for."""

    def change(line):
        whole = orjson.loads(line)
        values = np.frombuffer(base64.b64decode(whole[name]["data"]), "<f4").copy()
        values[0] = number
        whole[name]["data"] = base64.b64encode(values.tobytes()).decode()
        return orjson.dumps(whole) + b"\n"

    return change


BAD_LINES = [
    changed(top_ids="gone"), changed(finish_reason=None), changed(finish_reason=["stop"]), changed(token_ids=None),
    changed(token_ids={"dtype": "<f8", "shape": [4], "data": ""}), changed(error={"type": ["a"], "detail": ""}),
    changed(error=None), array(cut, token_ids=3), array(cut, token_ids=0), array(cut, prompt_token_ids=0),
    array(first, token_ids=2**40), array(first, token_ids=-1), array(first, token_ids=50), array(first, top_ids=1.7),
    array(first, top_ids=70_000), array(first, expert_logprobs=0.5), array(first, expert_logprobs=None),
    array(first, expert_logprobs=-99.0), array(lambda rows, k: [cut(row, k) for row in rows], amateur_logprobs=7),
    array(lambda rows, _: rows[0].__setitem__(1, rows[0][0]), top_ids=0),
    packed("expert_logprobs", np.nan), packed("expert_logprobs", np.inf), packed("expert_logprobs", -np.inf),
    packed("amateur_logprobs", np.nan), packed("amateur_logprobs", np.inf),
    lambda line: line_of({"id": "p3", "question": "", "top_k": 3}, 0), array(first, prompt_token_ids=50),
    array(first, expert_logprobs="-0.5"), array(first, token_ids=True), array(first, top_ids="7"),
    array(lambda ids, text: ids.extend([text, *["x"] * 16_000]), token_ids="x" * 2**20),
    lambda line: make_trajectory("p3", 1, 129, 20).to_line("base64"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES)
def test_a_line_that_is_not_of_the_contract_fails_its_trajectory_and_no_other(server, bad):
    server.line = lambda problem, index: (
        bad(line_of(problem, index)) if problem["id"] == "p3" else line_of(problem, index)
    )
    lines = {line.problem_id: line for line in sampled(server.url, PROBLEMS[:6])}
    assert sorted(lines) == [f"p{index}" for index in range(6)] and len(server.asked) == 1
    assert [name for name, line in lines.items() if isinstance(line, Failure)] == ["p3"]
    assert lines["p3"].type == "bad_line" and server.url in lines["p3"].detail


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"<html>\n", "sent an invalid line"),
        (b"[1]\n", "sent an invalid line"),
        (line_of({"id": "stranger", "question": ""}, 0), "answered .'stranger', 0., which was not requested"),
        (line_of({"id": "p1", "question": ""}, 7), "answered .'p1', 7., which was not requested"),
        (line_of({"id": "p3", "question": ""}, 0) * 2, "answered .'p3', 0., which was not requested, or came twice"),
    ],
)
def test_a_line_that_belongs_to_no_trajectory_ends_the_run_with_what_it_is(server, line, said):
    server.line = lambda problem, index: line if problem["id"] == "p3" else line_of(problem, index)
    with pytest.raises(ServiceError, match=f"{server.url} {said}"):
        sampled(server.url, PROBLEMS[:6])


def test_a_line_may_come_in_many_pieces_and_many_lines_in_one(server, monkeypatch):
    whole = make_trajectory("p0", 1, 3000, 20).to_line("base64")
    assert len(whole) > 10 * 65536

    def line(problem, index):
        """The second piece ends in the middle of the third problem's line, after two empty ones."""
        torn = line_of({"id": "p2", "question": "", "top_k": problem["top_k"]}, 0)
        pieces = {"p0": whole, "p1": b"\n\n" + line_of(problem, index) + torn[:100], "p2": torn[100:]}
        return pieces[problem["id"]]

    server.line = line
    settings = SamplingSettings(max_tokens=3000)
    lines = {line.problem_id: line for line in sampled(server.url, PROBLEMS[:3], settings)}
    assert all(isinstance(line, Trajectory) for line in lines.values()) and len(server.asked) == 1
    assert lines["p0"].to_line("base64") == whole and lines.keys() == {"p0", "p1", "p2"}
    monkeypatch.setattr(client.servers.connection, "MOST_ANSWER_LINE_BYTES", 300_000)
    with pytest.raises(ServiceError, match="a line of more than 300,000 bytes"):
        sampled(server.url, PROBLEMS[:3], settings)


def test_an_answer_that_ends_too_soon_is_asked_again_without_a_word(server):
    told, short = [], ["p1", "p2"]
    server.line = lambda problem, index: (
        b"" if problem["id"] in short and not short.remove(problem["id"]) else line_of(problem, index)
    )
    assert keys(sampled(server.url, PROBLEMS[:3], tell=told.append)) == once(PROBLEMS[:3])
    assert not short and not told


@pytest.mark.parametrize("path", ["/ready", "/v1/models"])
@pytest.mark.parametrize("status", [429, 502])
def test_what_passes_is_borne_before_the_work_too(server, monkeypatch, path, status):
    monkeypatch.setattr(client.servers.client, "READY_POLL_SECONDS", 0.02)
    refusals = [refusal(status, "not yet", retry_after="0")] * 3
    server.refuse = lambda request: refusals.pop() if request.url.path == path and refusals else None
    assert keys(sampled(server.url)) == once(PROBLEMS) and not refusals


def test_a_server_that_does_not_say_whether_it_is_ready_is_waited_for_no_longer_than_is_borne():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ServiceError, match=f"{url} is still not ready after 1 s: it does not respond"):
            sampled(url, patience=1)


@pytest.mark.parametrize(
    ("path", "content"),
    [("/version", b"<html>"), ("/version", b"[1]"), ("/v1/tokenizer", b"{}"), ("/v1/models", b"{}")],
)
def test_what_is_no_lightreasoner_server_is_named(server, path, content):
    server.refuse = lambda request: Response(content) if request.url.path == path else None

    async def ask():
        async with SamplingClient(server.url) as connection:
            await connection.models()
            await connection.tokenizer()
            await connection.versions()

    with pytest.raises(ServiceError, match=f"{server.url} is not a lightreasoner-server: its {path} "):
        asyncio.run(ask())


def test_a_password_in_a_servers_url_is_not_told():
    with pytest.raises(ServiceError) as error:
        sampled("http://user:secret@127.0.0.1:9", patience=0.2)
    assert "secret" not in str(error.value) and "http://127.0.0.1:9" in str(error.value)


def test_a_server_that_is_killed_and_started_again_costs_only_a_retry(monkeypatch):
    monkeypatch.setattr(client.servers.window, "OUTAGE_SECONDS", 0.05)
    monkeypatch.setattr(client.servers.dispatch, "OUTAGE_LOOK_SECONDS", 0.02)
    port = free_port()
    command = [sys.executable, "-m", "support.servers.contract_server", str(port)]
    processes, told = [], []

    def start():
        processes.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **PATH}))

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
    assert len(processes) == 2 and told[1:] == [f"{url} is back"]
    assert told[0].startswith(f"{url} has not answered for ")


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
        ServiceError, match=r"gave up: no server has responded for 3 s .*same command again to resume"
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
    """Neither before nor after the attempts that do count."""
    types = ["server_stopping"] * 5 + ["no_scores"] * 3 + ["server_stopping"] * 5

    def line(problem, index):
        return Failure(problem["id"], index, types.pop(), "bye").to_line() if types else line_of(problem, index)

    server.line = line
    assert [type(line) for line in sampled(server.url, PROBLEMS[:1])] == [Trajectory]


def test_of_several_trajectories_a_problem_each_is_had_once_though_it_is_asked_for_whole(server, proxy):
    proxy.cut_after = 6000

    def mend(lines):
        if len(lines) == 10:
            proxy.cut_after = None

    lines = sampled(proxy.url, PROBLEMS[:10], SamplingSettings(n=8, temperature=1.0), on_line=mend)
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
    monkeypatch.setattr(client.servers.connection, "READ_TIMEOUT_SECONDS", 0.5)
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

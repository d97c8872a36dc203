"""How a server ends: told to, killed, or with a dead engine. Nothing is left behind, and nobody waits in vain.

Real engines where the claim is about engines; stand-ins for them where it is about the server's process alone.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.processes.forked import ROOT, fork_server
from support.servers.job_calls import ended, owners, posted, questions, read_by_others
from support.servers.real_server import (
    DEMO,
    START_SECONDS,
    children_of,
    engine_processes,
    free_port,
    is_engine,
    mark_of,
    processes_of,
    sockets_of,
)
from support.servers.restarting import LEASE_SECONDS
from support.servers.stand_in import stand_in_server
from support.servers.stand_in_engines import STARTING
from word_problems import rows

from client.protocol.requests import parse_line
from client.runs.run import Run
from server import watchdog

GRACE_SECONDS = 2
LONG = {"max_tokens": 200, "top_k": 8, "temperature": 2.0, "seed": 1}


def wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met


class Asking(threading.Thread):
    """A request in the background: its lines, as they come, until the server is gone."""

    def __init__(self, server, problems, **fields):
        super().__init__()
        self.lines, self._server, self._body = [], server, {"problems": problems, **fields}
        self.taken = threading.Event()  # the server has answered 200: what is asked later waits behind this
        self.start()

    def run(self):
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream("POST", f"{self._server.url}/v1/trajectories", json=self._body, timeout=120) as response,
        ):
            assert response.status_code == 200
            self.taken.set()
            for line in response.iter_lines():
                if line.strip():
                    self.lines.append(json.loads(line))

    def all(self):
        self.join(120)
        assert not self.is_alive()
        return self.lines


def problems(count):
    return [{"id": row["id"], "question": row["question"]} for row in rows("dev", count)]


@pytest.mark.engine
@pytest.mark.parametrize("imported", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_signal_to_all_while_the_engines_start_ends_well_and_leaves_no_process(tmp_path, imported):
    """At every change a fork of a server, whose engines carry no mark: the watchdog does not find those, and they stay.

    That none stays is tried on the public command, and at every change with stand-ins, below.
    """
    words = ["--expert", str(DEMO / "expert"), "--amateur", str(DEMO / "amateur"), "--port", str(free_port())]
    with (tmp_path / "log").open("w") as log:
        if imported:
            main, words = "support.servers.imported:main", ["lightreasoner-server", *words]
            server = fork_server("server").fork(main, words, output=log.fileno(), session=True)
        else:
            server = subprocess.Popen(
                [sys.executable, "-m", "server", *words], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )
    deadline = time.monotonic() + START_SECONDS
    while not any(is_engine(pid) for pid in processes_of(server.pid)):
        assert server.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
    said = server.wait(120), (tmp_path / "log").read_text()
    assert said[0] == 0 and "Traceback" not in said[1], said[1][-3000:]
    if not imported:
        wait_until(lambda: not processes_of(server.pid), 15)
    left = processes_of(server.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert imported or not left


def test_a_signal_while_stand_ins_for_engines_start_leaves_none_of_them(tmp_path):
    """It comes to the server alone, for they heed it."""
    words = ["lightreasoner-server", "--expert", DEMO / "expert", "--amateur", DEMO / "amateur", "--port", free_port()]
    with (tmp_path / "log").open("w") as log:
        server = fork_server("server").fork(
            "support.servers.stand_in_engines:main", words, {STARTING: "1"}, output=log.fileno(), session=True
        )

    def stand_ins():
        found = []
        for pid in processes_of(server.pid):
            with contextlib.suppress(OSError):  # it has ended
                found += [pid] * (Path(f"/proc/{pid}/comm").read_text() == "sleep\n")
        return found

    try:
        assert wait_until(lambda: len(stand_ins()) == 2, 60)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0 and "ready: " not in (tmp_path / "log").read_text()
        assert wait_until(lambda: not stand_ins(), 5)
    finally:
        for pid in processes_of(server.pid):
            os.kill(pid, signal.SIGKILL)


def test_a_second_signal_waits_for_nothing_and_leaves_no_process(tmp_path):
    with stand_in_server(tmp_path, grace_seconds=300) as server:
        mark = mark_of(server)
        asking = Asking(server, problems(300), n=8, **LONG)
        assert wait_until(lambda: len(asking.lines) > 0, 60)
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: "stopping: " in server.log.read_text(), 10) and server.process.poll() is None
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 130
        assert "a second time" in server.log.read_text()
        assert wait_until(lambda: not watchdog.marked(mark), 5)


def test_a_dead_server_takes_its_engines_with_it(tmp_path):
    """test_forked_engines tries that vLLM's processes carry the mark too, by which the watchdog finds them."""
    with stand_in_server(tmp_path) as server:
        mark = mark_of(server)
        assert len(watchdog.marked(mark)) == 2
        server.process.kill()
        assert wait_until(lambda: not watchdog.marked(mark), 5)


def test_what_hangs_after_the_drain_does_not_keep_the_process(tmp_path):
    """A process without engines, whose thread waits for a store that does not answer."""
    code = """
import asyncio, os, signal, threading, time
from server.api import serving
serving.ENDING_SECONDS = 1.0
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        asyncio.get_running_loop().run_in_executor(None, time.sleep, 600)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
async def drain(): pass
serving.DrainingServer(app, drain).run(sockets=[__import__("socket").create_server(("127.0.0.1", 0))])
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_sigterm_lets_what_is_running_finish_within_the_grace_period_and_tells_the_rest(tmp_path):
    with stand_in_server(tmp_path, grace_seconds=GRACE_SECONDS) as server:
        mark = mark_of(server)
        short = Asking(server, problems(4), max_tokens=40)
        assert short.taken.wait(60)
        long = Asking(server, problems(300), n=8, **LONG)
        assert wait_until(lambda: server.metric("lightreasoner_queue_depth") > 2000, 30)
        with httpx.Client(base_url=server.url, timeout=30) as http:
            answered = len(long.lines)
            server.process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert wait_until(lambda: "stopping" in http.get("/ready").text, 2)
            assert http.post("/v1/trajectories", json={"problems": problems(1)}).status_code == 503
        assert server.process.wait(60) == 0
        assert time.monotonic() - began > GRACE_SECONDS
        assert [line.get("error") for line in short.all()] == [None] * 4
        lines = long.all()
        errors = [line["error"]["type"] for line in lines if "error" in line]
        assert len(lines) == 2400 and 0 < len(errors) < 2400 - answered and set(errors) == {"server_stopping"}
        assert wait_until(lambda: not watchdog.marked(mark), 5)


def test_metrics_of_both_engines_are_told_apart(demo_server):
    before = {role: demo_server.metric("vllm:prompt_tokens_total", role=role) for role in ("expert", "amateur")}
    steps = demo_server.metric("lightreasoner_steps_total")
    answer = httpx.post(f"{demo_server.url}/v1/trajectories", json={"problems": problems(8), "max_tokens": 40})
    found = [parse_line(line) for line in answer.iter_lines()]
    prompt, tokens = sum(len(line.prompt_token_ids) for line in found), sum(len(line.token_ids) for line in found)
    after = {role: demo_server.metric("vllm:prompt_tokens_total", role=role) for role in ("expert", "amateur")}
    assert after["expert"] - before["expert"] == prompt
    assert after["amateur"] - before["amateur"] == prompt + tokens
    assert demo_server.metric("lightreasoner_steps_total") - steps == tokens
    assert demo_server.metric("lightreasoner_event_loop_lag_seconds_count") > 0


@pytest.mark.last
def test_signals_to_all_processes_of_a_server_leave_it_to_the_server_to_end_them(demo_server):
    server = demo_server
    mark = mark_of(server)
    asking = Asking(server, problems(60), n=4, **LONG)
    assert wait_until(lambda: len(asking.lines) > 0, 60)
    guard = next(pid for pid in children_of(server) if b"watchdog" in Path(f"/proc/{pid}/cmdline").read_bytes())
    sockets = sockets_of(server)
    assert len(sockets) >= 4 and all(path.is_socket() for path in sockets)
    began, logged = time.monotonic(), len(server.log.read_text())
    for pid in {*children_of(server), *watchdog.marked(mark)}:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert Path(f"/proc/{guard}/cmdline").read_bytes()  # a zombie has none
    lines = asking.all()
    assert len(lines) == 240 and not any("error" in line for line in lines)
    assert server.process.wait(30) == 0 and time.monotonic() - began < 60
    assert not watchdog.marked(mark)
    assert all(path.parent.name.startswith("lr-") and not path.parent.exists() for path in sockets)
    assert "Traceback" not in server.log.read_text()[logged:]


@pytest.mark.last
def test_an_engine_that_hangs_is_found_and_told_of(equal_server):
    server = equal_server
    expert = min(engine_processes(server))
    time.sleep(5)  # without requests it takes no step either
    assert httpx.get(f"{server.url}/ready").status_code == 200
    asking = Asking(server, problems(300), n=8, **LONG)
    assert wait_until(lambda: len(asking.lines) > 0, 60)
    server.process.send_signal(signal.SIGSTOP)  # a server that slept must not take its engines for hung
    time.sleep(6)
    server.process.send_signal(signal.SIGCONT)
    before = len(asking.lines)
    assert wait_until(lambda: len(asking.lines) > before, 60)
    os.kill(expert, signal.SIGSTOP)
    errors = [line["error"] for line in asking.all() if "error" in line]
    assert errors and {error["type"] for error in errors} == {"engine_error"}
    reason = "the expert's engine died: it took no step for 4 s"
    assert all(reason in error["detail"] for error in errors)
    answer = httpx.get(f"{server.url}/health")
    assert answer.status_code == 503 and reason in answer.json()["detail"]
    assert wait_until(lambda: expert not in engine_processes(server), 5)


@pytest.mark.last
def test_a_dead_engine_is_told_of(smollm2_server):
    server = smollm2_server
    before = server.metric("lightreasoner_errors_total", type="engine_error")
    answered = server.metric("lightreasoner_engine_seconds_count", role="expert")
    amateur = max(engine_processes(server))
    os.kill(amateur, signal.SIGSTOP)  # so that it scores none before it is killed
    asking = Asking(server, problems(8), n=4, **LONG | {"max_tokens": 10})
    assert wait_until(lambda: server.metric("lightreasoner_engine_seconds_count", role="expert") > answered, 60)
    os.kill(amateur, signal.SIGKILL)
    errors = [line["error"] for line in asking.all() if "error" in line]
    assert len(errors) == 32 and {error["type"] for error in errors} == {"engine_error"}
    assert all("the amateur's engine died" in error["detail"] for error in errors)
    for path in ("/health", "/ready"):
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 503 and "the amateur's engine died" in answer.json()["detail"]
    assert httpx.post(f"{server.url}/v1/trajectories", json={"problems": problems(1)}).status_code == 503
    assert server.metric("lightreasoner_engine_up", role="amateur") == 0
    assert server.metric("lightreasoner_engine_up", role="expert") == 1
    assert server.metric("lightreasoner_errors_total", type="engine_error") == before + len(errors)
    assert len(engine_processes(server)) == 1  # the expert's lives on


@pytest.mark.last
def test_an_owner_whose_engine_dies_hands_its_job_to_another(service, service_bucket, tmp_path):
    """The other one has stand-ins for engines: it is enough that it finishes what was begun."""
    problems = questions(1500)
    job_id = posted(service, "runs/engine", problems)
    run = Run(f"{service_bucket}/runs/engine")
    wait_until(lambda: run.parts("samples"), 60)
    os.kill(engine_processes(service)[0], signal.SIGKILL)
    wait_until(lambda: b'"released":true' in (service_bucket / "jobs" / job_id / "beat-1").read_bytes(), 30)
    with stand_in_server(tmp_path, bucket=str(service_bucket), lease_seconds=LEASE_SECONDS) as other:
        done = ended(other, job_id)
    assert done["status"] == "completed" and done["request_counts"]["completed"] == 1500
    assert owners(service_bucket, job_id) == ["owner-1", "owner-2"]
    assert "0 rows written twice" in read_by_others(done["run"], problems, tmp_path)

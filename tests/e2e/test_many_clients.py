"""`lightreasoner-client sample` as several clients, killed clients and failing problems leave a RUN.

Against a real HTTP server that answers from memory, on a folder and on a real S3 server; whole RUNs are checked by the
separate script read_bucket.py.
"""

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import time

import obstore
import pytest
from support.processes.forked import fork
from support.processes.forked import run as run_forked
from support.runs.made_run import TOP_K
from support.servers.contract_server import TOKENS, ContractServer, line_of, refusal
from support.servers.job_calls import read_by_others, wait_until
from support.servers.proxy import Proxy
from support.servers.real_server import command
from support.servers.real_store import KEYS

from client.protocol.requests import Failure
from client.runs.run import Run

PROBLEMS = [{"id": f"p{index}", "question": f"What is {index}?"} for index in range(600)]


@pytest.fixture
def server():
    with ContractServer().running() as server:
        yield server


@pytest.fixture
def problem_file(tmp_path):
    def write(rows):
        file = tmp_path / f"problems-{len(rows)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write


def words(problems, run, server, *options):
    return ["client", "sample", problems, run, "--server", server.url, "--top-k", TOP_K, *options]


def sample(problems, run, server, *options):
    return command(*words(problems, run, server, *options))


def start(problems, run, server, *options):
    return fork(*words(problems, run, server, *options))


def unanswerable(*ids):
    return [{"id": name, "question": "unanswerable"} for name in ids]


# Failures.


def test_too_many_failures_stop_a_run_and_keep_what_was_answered(server, problem_file, tmp_path):
    problems, run = problem_file([*PROBLEMS[:16], *unanswerable("a", "b", "c"), *PROBLEMS[16:]]), tmp_path / "run"
    asked = []
    for _ in range(2):  # the second time, those of the first are too many already
        said = sample(problems, run, server, "--max-failures", 2)
        assert said.returncode == 1 and "error: 3 trajectories failed, more than --max-failures 2" in said.stderr
        assert "--retry-failed" in said.stderr and "Traceback" not in said.stderr
        asked.append(sum(map(len, server.asked)))
    assert asked[0] == asked[1]
    held = Run(str(run))
    assert held.completion() is None and len(held.keys()) >= 16 and len(held.failures()) == 3
    said = sample(problems, run, server, "--max-failures", 3)
    assert (
        said.returncode == 0 and held.completion().totals.failed == 3 and held.completion().totals.trajectories == 600
    )


def test_what_had_arrived_when_a_run_is_stopped_is_written(server, problem_file, tmp_path):
    """The failure comes first, in one piece with the answers to all others."""
    rows = [*unanswerable("a"), *PROBLEMS[:15]]

    def line(problem, index):
        return b"".join(line_of(problem | row, 0) for row in rows) if problem["id"] == "a" else b""

    server.line = line
    said = sample(problem_file(rows), tmp_path / "run", server, "--max-failures", 0)
    assert said.returncode == 1 and len(Run(str(tmp_path / "run")).keys()) == 15


def test_what_failed_is_asked_again_and_its_trajectory_is_what_readers_find(server, problem_file, bucket):
    """`a` can be answered the second time, `b` never."""
    problems = problem_file([*PROBLEMS[:30], *unanswerable("a", "b")])
    assert sample(problems, bucket, server, "--max-failures", 0).returncode == 1
    run = Run(bucket)
    wait_for = {("a", 0), ("b", 0)}
    assert run.failures().keys() == wait_for
    server.line = lambda problem, index: line_of(problem | ({"question": "?"} if problem["id"] == "a" else {}), index)
    server.asked.clear()
    there = run.keys()
    said = sample(problems, bucket, server, "--retry-failed", "--max-failures", 1)
    assert said.returncode == 0, said.stderr
    asked = [problem for batch in server.asked for problem in batch]
    assert {"a", "b"} <= set(asked) and not {problem for problem, _ in there} & set(asked)
    totals = run.completion().totals
    assert (totals.trajectories, totals.failed, totals.problems) == (31, 1, 31)
    assert "a" in {sample.problem_id for sample in run.samples()}


def test_without_being_told_to_nothing_that_failed_is_asked_again(server, problem_file, tmp_path):
    problems = problem_file([*PROBLEMS[:30], *unanswerable("a")])
    assert sample(problems, tmp_path / "run", server, "--max-failures", 0).returncode == 1
    server.asked.clear()
    assert sample(problems, tmp_path / "run", server).returncode == 0
    assert "a" not in {problem for batch in server.asked for problem in batch}


def test_a_complete_run_is_opened_again_for_what_failed_and_for_nothing_else(server, problem_file, bucket, tmp_path):
    problems, run = problem_file([*PROBLEMS[:30], *unanswerable("a", "b")]), Run(bucket)
    assert sample(problems, bucket, server).returncode == 0
    assert (run.completion().totals.trajectories, run.completion().totals.failed) == (30, 2)
    assert "nothing to do" in sample(problems, bucket, server).stdout
    server.asked.clear()
    server.refuse = lambda request: refusal(422, "no") if request.method == "POST" else None
    assert sample(problems, bucket, server, "--retry-failed").returncode == 1
    assert run.completion() is None and len(run.keys()) == 30
    server.refuse = lambda request: None
    server.line = lambda problem, index: line_of(problem | ({"question": "?"} if problem["id"] == "a" else {}), index)
    said = sample(problems, bucket, server, "--retry-failed")
    assert said.returncode == 0, said.stderr
    assert sorted(problem for batch in server.asked for problem in batch) == ["a", "b"]
    totals = run.completion().totals
    assert (totals.trajectories, totals.failed) == (31, 1) == (len(run.keys()), 1)
    server.line = lambda problem, index: line_of(problem | {"question": "?"}, index)
    assert sample(problems, bucket, server, "--retry-failed").returncode == 0
    assert run.completion().totals.failed == 0
    server.asked.clear()
    assert "nothing to do" in sample(problems, bucket, server, "--retry-failed").stdout and not server.asked


# Shards and several clients.


def test_three_clients_fill_one_run_and_whoever_is_last_seals_it(server, problem_file, bucket, tmp_path):
    problems = problem_file(PROBLEMS)
    for index, waiting in ((2, 400), (1, 200)):
        said = sample(problems, bucket, server, "--shard", f"{index}/3")
        assert (
            said.returncode == 0
            and f"shard {index}/3 is done; the other shards lack {waiting} trajectories" in said.stdout
        )
        assert Run(bucket).completion() is None
    assert sorted(problem for batch in server.asked for problem in batch) == sorted(
        problem for place, problem in enumerate(sorted(row["id"] for row in PROBLEMS)) if place % 3 != 2
    )
    said = sample(problems, bucket, server, "--shard", "3/3")
    assert said.returncode == 0 and "600" in said.stdout
    assert "600 problems once" in read_by_others(bucket, PROBLEMS, tmp_path)
    assert "0 rows written twice" in read_by_others(bucket, PROBLEMS, tmp_path)
    assert Run(bucket).manifest().problems.count == 600


def test_three_clients_at_the_same_time(server, problem_file, bucket, tmp_path):
    problems = problem_file(PROBLEMS)
    clients = [start(problems, bucket, server, "--shard", f"{index}/3") for index in (1, 2, 3)]
    for process in clients:
        said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert "0 rows written twice" in read_by_others(bucket, PROBLEMS, tmp_path)


def test_the_last_shard_makes_the_samples_that_another_left_out(server, problem_file, tmp_path):
    """A client that was killed between the two writes, after the last one had begun."""
    problems, run = problem_file(PROBLEMS), tmp_path / "run"
    assert sample(problems, run, server, "--shard", "1/2").returncode == 0
    part = min((run / "samples").iterdir())
    removed = []

    async def kill():
        if not removed:
            removed.append(part.read_bytes())
            part.unlink()

    server.before_line = kill
    assert sample(problems, run, server, "--shard", "2/2").returncode == 0
    assert removed and part.read_bytes() == removed[0]
    assert "600 problems once" in read_by_others(run, PROBLEMS, tmp_path)


def test_a_store_that_lost_a_part_is_not_sealed(server, problem_file, bucket, tmp_path):
    """What the first client wrote goes when the second has counted it."""
    problems, run = problem_file(PROBLEMS), Run(bucket)
    assert sample(problems, bucket, server, "--shard", "1/2").returncode == 0
    part = run.parts("trajectories")[0]
    held = len(run.trajectories_of(part))

    async def lose():
        server.before_line = None
        for kind in ("trajectories", "samples"):
            obstore.delete(run.bucket._open(for_writing=True), [f"{kind}/{part}.parquet"])

    server.before_line = lose
    said = sample(problems, bucket, server)
    assert said.returncode == 1 and f"lacks {held} trajectories that it held before" in said.stderr
    assert run.completion() is None and "Run the same command again" in said.stderr
    assert sample(problems, bucket, server).returncode == 0
    assert "600 problems once" in read_by_others(bucket, PROBLEMS, tmp_path)


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3"])
def test_what_is_no_shard_is_refused(server, problem_file, tmp_path, shard):
    said = sample(problem_file(PROBLEMS), tmp_path / "run", server, f"--shard={shard}")
    assert said.returncode == 1 and f"--shard: '{shard}' is not a shard" in said.stderr and not server.requests


def test_failures_are_retried_by_one_client(server, problem_file, tmp_path):
    said = sample(problem_file(PROBLEMS), tmp_path / "run", server, "--shard", "1/2", "--retry-failed")
    assert (
        said.returncode == 1 and "--retry-failed cannot be combined with --shard" in said.stderr and not server.requests
    )


def test_two_clients_by_mistake_leave_every_key_once_to_a_reader(server, problem_file, bucket, tmp_path):
    """Both ask for everything: neither finishes before the other has begun."""
    both = asyncio.Event()

    async def meet():
        if len({request.client.port for request in server.requests if request.method == "POST"}) > 16:
            both.set()  # more connections than one client opens
        await both.wait()

    server.before_line = meet
    problems = problem_file(PROBLEMS)
    clients = [start(problems, bucket, server) for _ in range(2)]
    outputs = []
    for process in clients:
        outputs.append(process.communicate(timeout=120)[0])
        assert process.returncode == 0
    assert sum(map(len, server.asked)) == 1200
    assert "600 problems once" in read_by_others(bucket, PROBLEMS, tmp_path)
    totals = Run(bucket).completion().totals
    assert totals.trajectories == len(list(Run(bucket).samples())) == 600
    assert (totals.tokens, totals.steps) == (600 * TOKENS, 600 * (TOKENS - 1))
    assert all(f"{totals.tokens:,}" in said for said in outputs)


# Killed clients.


def killed_and_resumed(times, server, problem_file, bucket, tmp_path):
    """A new RUN each time: kill the client at some moment of a whole run, then let it finish."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng, rows = random.Random(seed), [{"id": f"p{index}", "question": f"What is {index}?"} for index in range(900)]
    problems = problem_file(rows)

    async def slowly():
        await asyncio.sleep(0.015)

    server.before_line = slowly
    began = time.monotonic()
    assert sample(problems, f"{bucket}/whole", server).returncode == 0
    whole = time.monotonic() - began
    for attempt in range(times):
        process, delay = start(problems, f"{bucket}/{attempt}", server), rng.uniform(0, whole)
        time.sleep(delay)  # the moment is what is drawn
        process.kill()
        process.communicate()
        run = Run(f"{bucket}/{attempt}")
        keys = run.keys()
        held = {problem for problem, _ in keys}
        assert {sample.problem_id for sample in run.samples()} <= held
        print(f"killed after {delay:.2f} s of {whole:.2f} with {len(held)} of {len(rows)} written")
        server.asked.clear()
        said = sample(problems, run, server)
        assert said.returncode == 0, said.stderr
        asked = sorted(problem for batch in server.asked for problem in batch)
        assert asked == sorted({row["id"] for row in rows} - held)
        assert "900 problems once" in read_by_others(run, rows, tmp_path)


def test_a_client_killed_at_random_moments_loses_nothing_that_was_written(server, problem_file, bucket, tmp_path):
    killed_and_resumed(5, server, problem_file, bucket, tmp_path)


@pytest.mark.long
def test_a_client_killed_thirty_times(server, problem_file, bucket, tmp_path):
    killed_and_resumed(30, server, problem_file, bucket, tmp_path)


def test_killed_between_a_part_of_trajectories_and_its_samples_it_makes_the_samples(
    server, problem_file, s3, monkeypatch, tmp_path
):
    """Before the real store stands one that kills the client when it has put a part of trajectories."""
    bucket, problems, clients, killed = f"{s3}/{tmp_path.name}", problem_file(PROBLEMS), [], []

    def listener():
        puts = []

        def hear(asked, data):
            if asked and data.startswith(b"PUT ") and b"/trajectories/part-" in data.split(b"\r\n")[0]:
                puts.append(data)
            elif not asked and puts and data.startswith(b"HTTP/1.1 200"):
                clients[0].kill()
                killed.append(puts.pop())

        return hear

    with Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])).running() as proxy:
        proxy.listener = listener
        with monkeypatch.context() as changed:
            changed.setenv("AWS_ENDPOINT_URL", proxy.url)
            clients.append(start(problems, bucket, server))
            clients[0].communicate(timeout=60)
    assert killed and clients[0].returncode == -signal.SIGKILL
    assert Run(bucket).parts("trajectories") and not Run(bucket).parts("samples")
    assert sample(problems, bucket, server).returncode == 0
    assert "600 problems once" in read_by_others(bucket, PROBLEMS, tmp_path)


def test_a_store_that_is_out_for_a_while_costs_nothing(server, problem_file, s3, monkeypatch, tmp_path):
    """From the first part on it refuses, longer than its client library bears."""
    bucket, problems = f"{s3}/{tmp_path.name}", problem_file(PROBLEMS)
    with Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])).running() as proxy:

        def hear(asked, data):
            if asked and b"/trajectories/part-" in data.split(b"\r\n")[0]:
                proxy.listener, proxy.refusing = None, True
                proxy.cut()

        proxy.listener = lambda: hear
        with monkeypatch.context() as changed:
            changed.setenv("AWS_ENDPOINT_URL", proxy.url)
            process = start(problems, bucket, server)
        told = next(line for line in process.stderr if "trying again" in line)
        assert f"in {bucket}: " in told and proxy.refusing
        proxy.refusing = False
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0 and f"{bucket} can be written again" in told
    assert sorted(problem for batch in server.asked for problem in batch) == sorted(row["id"] for row in PROBLEMS)
    assert "600 problems once" in read_by_others(bucket, PROBLEMS, tmp_path)


# What stands in the way.


def test_a_full_disk_is_named_and_once_there_is_room_the_same_command_completes(server, problem_file, tmp_path):
    """A limit on the size of files, in KiB, stands for the disk: run.json fits and a part does not."""
    problems, run = problem_file(PROBLEMS), tmp_path / "run"
    said = run_forked(*words(problems, run, server), file_bytes=8 * 1024)
    assert said.returncode == 1 and "Traceback" not in said.stderr, said.stderr
    assert f"in {run}: " in said.stderr and not Run(str(run)).parts("trajectories")
    assert sample(problems, run, server).returncode == 0
    assert "600 problems once" in read_by_others(run, PROBLEMS, tmp_path)


def test_a_wrong_key_ends_in_the_servers_own_words(server, problem_file, tmp_path):
    server.refuse = lambda request: (
        None
        if request.url.path == "/ready" or request.headers.get("authorization") == "Bearer right"
        else refusal(401, "no such API key")
    )
    said = sample(problem_file(PROBLEMS), tmp_path / "run", server, "--api-key", "wrong")
    assert said.returncode == 1 and "no such API key" in said.stderr and "Traceback" not in said.stderr
    assert sample(problem_file(PROBLEMS), tmp_path / "run", server, "--api-key", "right").returncode == 0


def test_a_store_that_refuses_or_is_not_there_is_named_before_any_work(server, problem_file, s3, monkeypatch):
    problems, bucket = problem_file(PROBLEMS), f"{s3}/refused"
    for name, value in (("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ENDPOINT_URL", "http://127.0.0.1:9")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            said = sample(problems, bucket, server, "--patience", 1)
        assert said.returncode == 1 and f"in {bucket}: " in said.stderr and "Traceback" not in said.stderr
    said = sample(problems, "s3://nosuch/run", server)
    assert said.returncode == 1 and "in s3://nosuch/run: " in said.stderr and "NoSuchBucket" in said.stderr
    assert "create the bucket first" in said.stderr and "Traceback" not in said.stderr
    assert not server.asked


def test_engine_errors_that_stay_are_failures_with_their_reason_and_can_be_retried(server, problem_file, tmp_path):
    def line(problem, index):
        return Failure("p1", 0, "engine_error", "died").to_line() if problem["id"] == "p1" else line_of(problem, index)

    server.line = line
    problems, run = problem_file(PROBLEMS[:10]), Run(str(tmp_path / "run"))
    said = sample(problems, run, server)
    assert said.returncode == 0 and "1 trajectories failed; the reasons are in" in said.stdout
    assert "run the same command with --retry-failed" in said.stdout
    assert sum(batch.count("p1") for batch in server.asked) == 4
    assert run.failures()[("p1", 0)] == Failure("p1", 0, "engine_error", "died")
    server.line = line_of
    assert sample(problems, run, server, "--retry-failed").returncode == 0
    assert "10 problems once" in read_by_others(run, PROBLEMS[:10], tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_disk_that_is_given_room_in_time_costs_nothing(server, problem_file, small_disk, tmp_path):
    full, rows = small_disk / "full", [{"id": f"p{index}", "question": "?"} for index in range(2000)]
    full.write_bytes(bytes(450_000))
    process = start(problem_file(rows), small_disk / "run", server)
    told = next(line for line in process.stderr if "trying again" in line)
    assert f"in {small_disk / 'run'}: " in told and "No space left" in told
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0 and "can be written again" in told
    assert sorted(name for batch in server.asked for name in batch) == sorted(row["id"] for row in rows)
    assert "2000 problems once" in read_by_others(small_disk / "run", rows, tmp_path)


def test_a_disk_that_stays_full_ends_the_run_and_what_it_refused_is_kept(
    server, problem_file, small_disk, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    rows = [{"id": f"p{index}", "question": "?"} for index in range(2000)]
    said = sample(problem_file(rows), small_disk / "run", server, "--patience", 1)
    held = len(Run(str(small_disk / "run")).keys())
    assert said.returncode == 1 and "Traceback" not in said.stderr and 0 < held < 2000
    assert (
        f"trajectories could not be written and are kept in {tmp_path}/state/lightreasoner/spool/" in said.stderr
        and "Run the same command again to resume" in said.stderr
    )
    assert {file.suffix for file in (small_disk / "run").rglob("*") if file.is_file()} == {".parquet", ".json"}
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    server.asked.clear()
    assert sample(problem_file(rows), small_disk / "run", server).returncode == 0
    assert sum(map(len, server.asked)) < 2000 - held
    assert "2000 problems once" in read_by_others(small_disk / "run", rows, tmp_path)


# Signals.


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_client_that_is_told_to_stop_writes_what_was_answered(server, problem_file, tmp_path, number, status):
    answered = []

    async def hang_after_a_while():
        if len(answered) >= 100:
            await asyncio.Event().wait()
        answered.append(True)

    server.before_line = hang_after_a_while
    process = start(problem_file(PROBLEMS), tmp_path / "run", server)
    wait_until(lambda: len(answered) >= 100, "it")
    time.sleep(0.5)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
    assert process.returncode == status and "Run the same command again to " in said, said
    assert len(Run(str(tmp_path / "run")).keys()) == 100


@pytest.mark.parametrize("mute", ["server", "bucket"])
def test_a_client_that_waits_for_somebody_mute_stops_at_once(server, problem_file, tmp_path, monkeypatch, mute):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url, run = f"http://127.0.0.1:{listener.getsockname()[1]}", tmp_path / "run"
        if mute == "server":
            server.url = url
        else:
            run = "s3://samples/run"
            for name, value in {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}.items():
                monkeypatch.setenv(name, value)
        process = start(problem_file(PROBLEMS), run, server)
        connection, _ = listener.accept()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=5)[1]
        connection.close()
    assert process.returncode == 130 and "stopped before the first request to a server" in said
    assert "Traceback" not in said and not server.asked


def test_a_second_signal_waits_for_nothing(server, problem_file, tmp_path, s3, monkeypatch):
    """The bucket has gone silent, in the middle of a part."""
    bucket = f"{s3}/{tmp_path.name}"
    with Proxy(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])).running() as proxy:
        parts = []

        def hear(asked, data):
            if asked and b"/trajectories/part-" in data.split(b"\r\n")[0]:
                parts.append(data)
            while parts and not asked:  # nothing more is passed on; this blocks the proxy alone
                time.sleep(0.1)
                if process.poll() is not None:
                    break

        proxy.listener = lambda: hear
        with monkeypatch.context() as changed:
            changed.setenv("AWS_ENDPOINT_URL", proxy.url)
            process = start(problem_file(PROBLEMS), bucket, server)
        wait_until(lambda: parts, "a part")
        process.send_signal(signal.SIGINT)
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=5)[1]
    assert process.returncode == 130 and f"stopped at once; {bucket} holds what was written" in said


# What users get wrong.


def test_a_setting_that_no_server_would_take_does_not_become_a_runs(server, problem_file, tmp_path):
    problems = problem_file(PROBLEMS[:5])
    said = sample(problems, tmp_path / "run", server, "--system-prompt", "x" * 100_001)
    assert said.returncode == 1 and "--system-prompt" in said.stderr and "Traceback" not in said.stderr
    assert sample(problems, tmp_path / "run", server).returncode == 0


def test_no_place_at_all_is_not_the_current_folder(server, problem_file):
    said = sample(problem_file(PROBLEMS[:5]), "", server)
    assert said.returncode == 1 and "the path is empty; give a path, file://" in said.stderr and not server.asked

"""A client that is killed, or told to stop, loses nothing that was answered.

Against a real HTTP server that answers from memory, on a folder and on a real S3 server.
"""

import asyncio
import os
import random
import signal
import socket
import time

import pytest
from support.servers.client_calls import PROBLEMS, sample, start
from support.servers.job_calls import read_by_others, wait_until
from support.servers.proxy import Proxy
from support.servers.real_store import KEYS

from client.runs.run import Run


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
    killed_and_resumed(3, server, problem_file, bucket, tmp_path)


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
        said = process.communicate(timeout=25)[1]
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
        said = process.communicate(timeout=25)[1]
    assert process.returncode == 130 and f"stopped at once; {bucket} holds what was written" in said

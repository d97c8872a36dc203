"""A store that is out or refuses, a full disk, a wrong key: waited for, or named, and nothing is lost.

Against a real HTTP server that answers from memory, on a folder and on a real S3 server.
"""

import subprocess

import pytest
from support.processes.forked import run as run_forked
from support.servers.client_calls import PROBLEMS, sample, start, words
from support.servers.contract_server import refusal
from support.servers.job_calls import read_by_others

from client.runs.run import Run


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

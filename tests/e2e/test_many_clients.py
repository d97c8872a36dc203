"""Several clients and shards on one RUN, and settings and places that are refused.

Against a real HTTP server that answers from memory, on a folder and on a real S3 server. Whole RUNs are checked by the
separate script read_bucket.py.
"""

import asyncio

import obstore
import pytest
from support.servers.client_calls import PROBLEMS, sample, start
from support.servers.contract_server import TOKENS
from support.servers.job_calls import read_by_others

from client.runs.run import Run


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


def test_a_setting_that_no_server_would_take_does_not_become_a_runs(server, problem_file, tmp_path):
    problems = problem_file(PROBLEMS[:5])
    said = sample(problems, tmp_path / "run", server, "--system-prompt", "x" * 100_001)
    assert said.returncode == 1 and "--system-prompt" in said.stderr and "Traceback" not in said.stderr
    assert sample(problems, tmp_path / "run", server).returncode == 0


def test_no_place_at_all_is_not_the_current_folder(server, problem_file):
    said = sample(problem_file(PROBLEMS[:5]), "", server)
    assert said.returncode == 1 and "the path is empty; give a path, file://" in said.stderr and not server.asked

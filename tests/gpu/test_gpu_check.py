"""Tests of the check for a GPU node (`make gpu-check`): all of it on a GPU; without one, parts on the demo's pair."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from gpu.card import Card, Look, apart
from gpu.check import DEFAULT_PAIRS, PARTS, SIZES, run
from gpu.pairs import pair
from gpu.parts import MARKS, memory, phases, plans
from gpu.session import Session, Sizes
from support.servers.real_server import ROOT, RunningServer

from server.memory import EngineShape, gpu_arguments
from server.settings import GIB

AT_EVERY_CHANGE = ("start", "sampling", "exactness")


def test_the_check_runs_on_a_cpu(demo_server, tmp_path):
    """It uses a server that runs already."""
    found = {}
    with Session(pair("demo", tmp_path, "cpu"), Card("cpu"), Sizes(24, 24, 6), tmp_path / "work") as session:
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
    """PyTorch keeps the memory that it has used, so a server that starts next would not find it free."""
    assert apart(os.getppid) == os.getpid()


def test_memory_on_a_gpu_is_what_came_into_use_while_an_engine_loaded_beside_the_servers_plan(tmp_path, caplog):
    """The log is as a server writes it, and nvidia-smi is read every half second."""
    shape = EngineShape((0,), 3 * GIB, 16, 20_000, 128_256, 2, 16_384, 4096)
    with caplog.at_level("INFO"):
        gpu_arguments({"expert": shape, "amateur": shape}, {"expert": {}, "amateur": {}}, {0: 40 * GIB})
    began = datetime(2026, 1, 1, tzinfo=UTC)
    messages = ["checks", *caplog.messages, *MARKS]
    times = [began + timedelta(seconds=10 * index) for index in range(len(messages))]
    log = tmp_path / "server.log"
    log.write_text("of a library\n{'a': 1}\n" + "".join(
        json.dumps({"time": time.isoformat(), "message": said}) + "\n"
        for time, said in zip(times, messages, strict=True)
    ))  # fmt: skip
    server = RunningServer("", tmp_path, tmp_path, log, None)
    listening, expert, amateur, ready = times[-4:]
    session = SimpleNamespace(start_looks=[
        Look(began, 0.0, 1 * GIB), Look(listening + timedelta(seconds=1), 0.0, 1 * GIB),
        Look(expert - timedelta(seconds=1), 0.0, 9 * GIB), Look(expert, 0.0, 31 * GIB),
        Look(amateur, 0.0, 36 * GIB), Look(ready, 0.0, 37 * GIB),
    ])  # fmt: skip
    assert dict(memory(session, server, [])) == {"expert": 30 * GIB, "amateur": 6 * GIB}
    planned = {match[1]: sum(map(float, match.groups()[1:])) for match in plans(server)}
    assert planned.keys() == {"expert", "amateur"} and sum(planned.values()) == pytest.approx(26.8, abs=0.1)
    assert [seconds for _, seconds in phases(server)] == [30, 10, 10, 10]


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

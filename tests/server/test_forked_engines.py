"""Real engines on a CPU are forks of one process that has imported vLLM; `test_forkserver` tries when they are not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.servers.real_server import children_of, engine_processes, mark_of

from server import watchdog
from server.engines.signals import MEANT_FOR_ALL


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def blocked_or_ignored(pid):
    """Numbers of the signals that a process does not heed."""
    lines = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    mask = int(lines["SigBlk"], 16) | int(lines["SigIgn"], 16)
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_both_engines_are_forks_of_one_process_with_one_thread(demo_server):
    engines = engine_processes(demo_server)
    (parent,) = {parent_of(pid) for pid in engines}
    assert len(engines) == 2 and parent != demo_server.process.pid and parent in children_of(demo_server)
    assert len(list(Path(f"/proc/{parent}/task").iterdir())) == 1


def test_the_fork_server_ends_with_the_server_and_by_nothing_else(demo_server):
    parent = parent_of(engine_processes(demo_server)[0])
    # which the watchdog kills
    assert {parent, *engine_processes(demo_server)} <= set(watchdog.marked(mark_of(demo_server)))
    assert blocked_or_ignored(parent) >= MEANT_FOR_ALL


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a single core is shared by both engines")
def test_each_engine_computes_on_cores_of_its_own(demo_server):
    expert, amateur = (os.sched_getaffinity(pid) for pid in engine_processes(demo_server))
    assert expert and amateur and not expert & amateur

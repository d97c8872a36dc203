"""The time of a server's start with forked engines, against spawned ones. The demo's pair, float32.

Prints, from one run: seconds from the command to /ready, and the CPU seconds of all processes until then, of both ways
in turns; their medians and the ratios. The machine should be otherwise idle: on a busy one the CPU seconds are the
better measure. On a GPU both ways are the same, because there the server always spawns its engines.

    .venv/bin/python tests/benchmarks/start.py [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "deploy" / "demo")]

from support.servers.real_server import DEMO, running_server  # noqa: E402

from server.engines.forkserver import SPAWN_ENGINES  # noqa: E402

WAYS = {"spawned": "1", "forked": "0"}
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(session: int) -> float:
    """CPU seconds of all processes of a session, and of their children that have ended."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == session:
            total += sum(map(int, fields[11:15]))
    return total / TICKS


def start(way: str) -> tuple[float, float]:
    """Seconds and CPU seconds of one start."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {SPAWN_ENGINES: WAYS[way]}):
        began = time.perf_counter()
        with running_server(DEMO / "expert", DEMO / "amateur", Path(folder)) as server:
            return time.perf_counter() - began, cpu_seconds(server.process.pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            found[way].append(start(way))
            print(f"{way}: {found[way][-1][0]:.1f} s, {found[way][-1][1]:.1f} CPU s", flush=True)
    medians = {way: [round(median(values), 1) for values in zip(*starts, strict=True)] for way, starts in found.items()}
    ratios = [round(forked / spawned, 2) for forked, spawned in zip(medians["forked"], medians["spawned"], strict=True)]
    print(json.dumps({"seconds and CPU seconds": medians, "forked / spawned": ratios}))


if __name__ == "__main__":
    main()

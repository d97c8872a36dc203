"""What Ray Serve costs: problems a second through one plain server, and through Ray Serve with one and three replicas.

Engines answer from memory, 128 tokens with top-k 20 in 0.26 s, 64 at a time: a replica has at most 250 a second, and
what is below that is HTTP, Ray and our own code. All of it shares this machine's cores; three replicas are faster than
one only where there are cores for them. Prints JSON, with ratios of the one run, and the front's peak memory. Take an
idle machine.

    .venv/bin/python tests/benchmarks/cluster.py [--problems 2000]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ON_PATH = ROOT / "tests" / "support" / "cluster" / "on_path"
sys.path[:0] = [str(ON_PATH), str(ROOT), str(ROOT / "tests")]
TOKENS, TOP_K, WARM = 128, 20, 200


def rate(url: str, count: int) -> float:
    """Problems a second of one client, after a few that are not counted."""
    from support.runs.sampled import keys, more, once, sampled

    from client.protocol.requests import SamplingSettings

    settings = SamplingSettings(max_tokens=TOKENS, top_k=TOP_K)
    sampled(url, more(WARM), settings)
    problems, began = more(count), time.perf_counter()
    assert keys(sampled(url, problems, settings)) == once(problems)
    return count / (time.perf_counter() - began)


def main() -> None:
    from support.cluster.cluster_jobs import is_ready
    from support.cluster.local_cluster import local_cluster, until
    from support.servers.stand_in import stand_in_server

    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=2000)
    count, found, memory = parser.parse_args().problems, {}, {}
    folder = Path(tempfile.mkdtemp())
    with stand_in_server(folder) as server:
        found["plain server"] = rate(server.url, count)
    for replicas in (1, 3):
        within = folder / str(replicas)
        within.mkdir()
        with local_cluster(within) as cluster:
            cluster.serve(min_replicas=replicas)
            until(lambda cluster=cluster: is_ready(cluster), 300)
            found[f"Ray Serve, replicas {replicas}"] = rate(cluster.url, count)
            status = Path(f"/proc/{cluster.pid_of('Front')}/status").read_text()
            memory[replicas] = int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024
    plain = found["plain server"]
    ratios = {name: round(value / plain, 2) for name, value in found.items()}
    figures = {name: round(value, 1) for name, value in found.items()}
    printed = {"cores": os.cpu_count(), "problems/s": figures, "of the plain server": ratios, "front, MiB": memory}
    print(json.dumps(printed, indent=1))


if __name__ == "__main__":
    main()

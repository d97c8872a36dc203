"""The cost of Ray Serve: problems/s and CPU time of a plain server, and of Ray Serve with one replica and with three.

Engines answer from memory, 128 tokens with top-k 20 in 0.26 s, 64 at a time. So a replica answers at most 250 problems
a second; HTTP, Ray and our own code cost the rest. Everything shares this machine's cores: three replicas are faster
than one only if there are cores for them. The plain server and Ray Serve take turns, so that other processes slow both.
CPU time is that of all processes of the service, including the stand-in engines, which make up every answer anew.
Prints JSON.

    .venv/bin/python tests/benchmarks/cluster.py [--problems 1000] [--rounds 3]
    .venv/bin/python tests/benchmarks/cluster.py --job 100000     # instead: the front's peak memory in such a job
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
ON_PATH = ROOT / "tests" / "support" / "cluster" / "on_path"
sys.path[:0] = [str(ON_PATH), str(ROOT), str(ROOT / "tests")]
TOKENS, TOP_K, WARM = 128, 20, 200
JOB_TOKENS = 8
"""Tokens of each problem with --job, which measures memory and not time."""


def main() -> None:
    from support.cluster.local_cluster import local_cluster
    from support.servers.stand_in import stand_in_server

    parser = argparse.ArgumentParser()
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", type=int, default=0)
    given = parser.parse_args()
    plain, ray = (Path(tempfile.mkdtemp()) for _ in range(2))
    if given.job:
        with local_cluster(ray) as cluster:
            print(json.dumps(in_a_job(cluster, given.job, ray / "bucket"), indent=1))
        return
    with stand_in_server(plain) as server, local_cluster(ray) as cluster:
        found = {
            f"replicas {replicas}": beside(server, cluster, replicas, given.problems, given.rounds)
            for replicas in (1, 3)
        }
    print(json.dumps({"cores": os.cpu_count(), **found}, indent=1))


def beside(server: Any, cluster: Any, replicas: int, count: int, rounds: int) -> dict[str, Any]:
    """Medians of both ways, in turns, and of their ratios. The front is one process: its CPU time bounds the rate."""
    from support.servers.real_server import processes_of

    serve(cluster, replicas)
    processes: dict[str, Callable[[], Iterable[int]]] = {
        "plain server": lambda: processes_of(server.process.pid),
        "Ray Serve": lambda: processes_with(cluster.folder),
        "its front": lambda: [cluster.pid_of("Front")],
    }
    rates: dict[str, list[float]] = {"plain server": [], "Ray Serve": []}
    cpu: dict[str, list[float]] = {name: [] for name in processes}
    for url in (server.url, cluster.url):
        sample(url, WARM)
    for _ in range(rounds):
        for name, url in (("plain server", server.url), ("Ray Serve", cluster.url)):
            asked = [way for way in processes if (way == "plain server") == (name == "plain server")]
            before, began = {way: cpu_seconds(processes[way]()) for way in asked}, time.perf_counter()
            sample(url, count)
            rates[name].append(count / (time.perf_counter() - began))
            for way in asked:
                cpu[way].append(1000 * (cpu_seconds(processes[way]()) - before[way]) / count)
    ratios = [ray / plain for plain, ray in zip(*rates.values(), strict=True)]
    return {
        "problems/s": {name: round(median(values), 1) for name, values in rates.items()},
        "of the plain server": {"median": round(median(ratios), 2), "each": [round(ratio, 2) for ratio in ratios]},
        "CPU ms a trajectory": {name: round(median(values), 1) for name, values in cpu.items()},
    }


def sample(url: str, count: int) -> None:
    from support.runs.sampled import keys, more, once, sampled

    from client.protocol.requests import SamplingSettings

    problems = more(count)
    assert keys(sampled(url, problems, SamplingSettings(max_tokens=TOKENS, top_k=TOP_K))) == once(problems)


def in_a_job(cluster: Any, count: int, bucket: Path) -> dict[str, Any]:
    """The front's peak memory before and after a job whose problems are in the bucket."""
    import httpx
    from support.cluster.cluster_jobs import completed

    bucket.mkdir()
    lines = (json.dumps({"id": f"{number}", "question": "And?"}) for number in range(count))
    (bucket / "problems.jsonl").write_text("\n".join(lines))
    serve(cluster, 3, bucket=str(bucket))
    memory, began = {"before": peak_mib(cluster.pid_of("Front"))}, time.perf_counter()
    body = {"problems_url": "problems.jsonl", "run": "run", "max_tokens": JOB_TOKENS, "top_k": 4}
    posted = httpx.post(f"{cluster.url}/v1/jobs", json=body, timeout=60).raise_for_status().json()
    ended = completed(cluster, posted["id"], seconds=3600)
    assert ended["request_counts"]["completed"] == count
    memory["after"] = peak_mib(cluster.pid_of("Front"))
    rate = round(count / (time.perf_counter() - began), 1)
    return {"job of": count, "tokens": JOB_TOKENS, "front, MiB": memory, "problems/s": rate}


def serve(cluster: Any, replicas: int, **settings: Any) -> None:
    from support.cluster.cluster_jobs import is_ready
    from support.cluster.local_cluster import until

    cluster.serve(min_replicas=replicas, **settings)
    until(lambda: is_ready(cluster) and cluster.replicas() == replicas, 300)


def processes_with(folder: Path) -> list[int]:
    """The processes of a cluster, found by its folder in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in environment:
            found.append(int(process.name))
    return found


def cpu_seconds(processes: Iterable[int]) -> float:
    """User and system time of processes, without those that have ended."""
    ticks = 0
    for process in processes:
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_mib(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024


if __name__ == "__main__":
    main()

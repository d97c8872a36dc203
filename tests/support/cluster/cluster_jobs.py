"""Requests for jobs to the front of a cluster, which may be unreachable for a while."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq

from support.cluster.local_cluster import LocalCluster, until
from support.runs.sampled import more


def is_ready(cluster: LocalCluster) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{cluster.url}/ready").status_code == 200
    return False


def submitted(cluster: LocalCluster, count: int, run: str, max_tokens: int = 8) -> str:
    """Submit a job of `count` problems. Returns its id."""
    problems = [{"id": problem.id, "question": problem.question} for problem in more(count)]
    body = {"problems": problems, "run": run, "max_tokens": max_tokens, "top_k": 4}
    return httpx.post(f"{cluster.url}/v1/jobs", json=body, timeout=60).raise_for_status().json()["id"]


def job(cluster: LocalCluster, job_id: str) -> dict[str, Any]:
    with contextlib.suppress(httpx.HTTPError, ValueError):
        return httpx.get(f"{cluster.url}/v1/jobs/{job_id}", timeout=10).raise_for_status().json()
    return {"status": "unknown", "request_counts": {"completed": 0, "failed": 0}}


def done(cluster: LocalCluster, job_id: str) -> int:
    return job(cluster, job_id)["request_counts"]["completed"]


def completed(cluster: LocalCluster, job_id: str, seconds: float = 120) -> dict[str, Any]:
    return until(lambda: (found := job(cluster, job_id))["status"] == "completed" and found, seconds)


def in_run(bucket: Path, run: str) -> Counter[str]:
    """How often each problem occurs in the parts of a RUN, repeats included."""
    found: Counter[str] = Counter()
    for part in (bucket / run / "trajectories").glob("*.parquet"):
        found.update(pq.read_table(part, columns=["problem_id"])["problem_id"].to_pylist())
    return found

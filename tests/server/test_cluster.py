"""The application on Ray Serve: one address, replicas that are lost, a front that is started again.

A local Ray cluster of three nodes; the replicas' engines answer from memory. All else is real.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'lightreasoner[ray]'")

from support.cluster.cluster_jobs import completed, done, in_run, is_ready, submitted
from support.cluster.local_cluster import LocalCluster, local_cluster, until
from support.runs.sampled import keys, more, once, sampled

from client.protocol.requests import SamplingSettings, Trajectory
from server.cluster.application import application
from server.settings import SettingsError

SHORT = SamplingSettings(max_tokens=8, top_k=4)
LEASE_SECONDS = 2.0


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster-jobs")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, bucket: Path) -> Any:
    with local_cluster(tmp_path_factory.mktemp("cluster")) as running:
        running.serve(min_replicas=2, bucket=str(bucket), lease_seconds=LEASE_SECONDS, grace_seconds=2)
        until(lambda: is_ready(running), 120)
        yield running


def answered(cluster: LocalCluster, count: int, disturb: Callable[[], None]) -> Counter[str]:
    """How often each problem of one request gets a trajectory; `disturb` is called after the first 20."""
    body = {"problems": [{"id": f"{index}", "question": "?"} for index in range(count)], "max_tokens": 50, "top_k": 4}
    found: Counter[str] = Counter()
    with httpx.stream("POST", f"{cluster.url}/v1/trajectories", json=body, timeout=120) as answer:
        for line in filter(None, answer.iter_lines()):
            told = json.loads(line)
            assert "error" not in told, told
            found[told["problem_id"]] += 1
            if found.total() == 20:
                disturb()
    return found


@pytest.mark.process
def test_problems_are_spread_over_the_replicas_and_each_is_answered_once(cluster: LocalCluster) -> None:
    before, problems = Counter(cluster.counts()), more(400)
    lines = sampled(cluster.url, problems, SHORT)
    assert keys(lines) == once(problems) and all(isinstance(line, Trajectory) for line in lines)
    asked = Counter(cluster.counts()) - before
    assert len(asked) == 2 and min(asked.values()) > 40  # Ray chooses the less busy one of two


@pytest.mark.process
def test_a_killed_replica_costs_its_requests_only(cluster: LocalCluster) -> None:
    """They are asked again by the front: no client needs to."""
    before = cluster.counts()

    def kill() -> None:
        asked = Counter(cluster.counts()) - Counter(before)
        cluster.kill(max(asked, key=lambda process: asked[process]))

    assert answered(cluster, 250, kill) == Counter(f"{index}" for index in range(250))


@pytest.mark.long
def test_a_replica_whose_engine_died_is_ended_and_its_requests_are_asked_elsewhere(cluster: LocalCluster) -> None:
    assert answered(cluster, 250, (cluster.folder / "die").touch) == Counter(f"{index}" for index in range(250))
    assert not (cluster.folder / "die").exists()


@pytest.mark.process
def test_a_client_that_leaves_frees_the_replicas_engines(cluster: LocalCluster) -> None:
    until(lambda: cluster.replicas() == 2, 120)
    before = sum(cluster.counts("cancelled").values())
    body = {"problems": [{"id": str(i), "question": "?"} for i in range(16)], "max_tokens": 100}  # 0.2 s each

    async def leave() -> None:
        async with httpx.AsyncClient() as http:
            with contextlib.suppress(TimeoutError):
                async with (
                    asyncio.timeout(0.15),
                    http.stream("POST", f"{cluster.url}/v1/trajectories", json=body) as one,
                ):
                    async for _ in one.aiter_lines():
                        break

    def left() -> bool:
        asyncio.run(leave())
        time.sleep(0.5)
        return sum(cluster.counts("cancelled").values()) > before

    until(left, 20)


@pytest.mark.long
def test_a_job_goes_on_when_the_front_is_killed(cluster: LocalCluster, bucket: Path) -> None:
    job_id = submitted(cluster, 1500, "front")
    until(lambda: done(cluster, job_id) > 50)
    cluster.kill(cluster.pid_of("Front"))
    ended = completed(cluster, job_id)
    assert ended["request_counts"] == {"total": 1500, "completed": 1500, "failed": 0}
    assert in_run(bucket, "front") == Counter(problem.id for problem in more(1500))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "no expert model"),
        ({"expert": "x", "amateur": "y"}, "an API key is needed"),
        ({"expert": "x", "amateur": "y", "host": "127.0.0.1", "min_replicas": 3, "max_replicas": 2}, "max_replicas 2"),
        ({"expert": "x", "amateur": "y", "host": "127.0.0.1", "replica": 3}, "unknown setting"),
    ],
)
def test_invalid_arguments_are_named_before_anything_starts(args: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        application(args)


def test_a_replica_is_given_as_many_requests_as_its_slots_allow() -> None:
    front = application({"host": "127.0.0.1", "expert": "x", "amateur": "y", "min_replicas": 1, "max_replicas": 3})
    pair = front._bound_deployment.init_args[1]._bound_deployment
    assert pair.max_ongoing_requests == 512
    assert pair._deployment_config.autoscaling_config.target_ongoing_requests == 128

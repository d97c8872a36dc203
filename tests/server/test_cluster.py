"""The application on Ray Serve: one address, replicas that are lost, a front that is started again.

A local Ray cluster; the replicas' engines answer from memory, and wait while a test counts. All else is real.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'lightreasoner[ray]'")

from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from support.cluster.cluster_jobs import completed, done, in_run, is_ready, submitted
from support.cluster.local_cluster import LocalCluster, local_cluster, until
from support.runs.sampled import more
from support.servers.real_server import DEMO
from support.servers.stand_in_engines import SLOTS

from server.api.streaming import WINDOW
from server.cluster.application import application
from server.cluster.replica import PairReplica
from server.jobs.pair_source import SHARE_OF_SLOTS
from server.settings import SettingsError

LEASE_SECONDS = 2.0


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster-jobs")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, bucket: Path) -> Any:
    """Two replicas, which take all of Ray's CPUs; the front must have its place all the same."""
    with local_cluster(tmp_path_factory.mktemp("cluster"), cpus=2) as running:
        running.serve(min_replicas=2, bucket=str(bucket), lease_seconds=LEASE_SECONDS, grace_seconds=2)
        until(lambda: is_ready(running), 120)
        yield running


def answered(cluster: LocalCluster, count: int) -> Counter[str]:
    """How often each problem of one request gets a trajectory."""
    body = {"problems": [{"id": f"{index}", "question": "?"} for index in range(count)], "max_tokens": 8, "top_k": 4}
    with httpx.stream("POST", f"{cluster.url}/v1/trajectories", json=body, timeout=120) as answer:
        lines = [json.loads(line) for line in answer.iter_lines() if line]
    assert not [line for line in lines if "error" in line]
    return Counter(line["problem_id"] for line in lines)


def each_once(count: int) -> Counter[str]:
    return Counter(f"{index}" for index in range(count))


def open_at(cluster: LocalCluster, before: Counter[int], count: int) -> Counter[int]:
    """What each replica was asked since then, once that is so many in all and stays so."""

    def asked() -> Counter[int]:
        return Counter(cluster.counts()) - before

    until(lambda: asked().total() >= count)
    time.sleep(0.5)
    assert asked().total() == count
    return asked()


@pytest.mark.process
def test_one_request_fills_the_slots_of_all_replicas_and_each_problem_is_answered_once(cluster: LocalCluster) -> None:
    before, count = Counter(cluster.counts()), WINDOW + 30
    with ThreadPoolExecutor() as pool:
        with cluster.held():
            found = pool.submit(answered, cluster, count)
            asked = open_at(cluster, before, WINDOW)
            assert len(asked) == 2 and min(asked.values()) >= SLOTS
        assert found.result() == each_once(count)
    assert (Counter(cluster.counts()) - before).total() == count


@pytest.mark.process
def test_a_job_has_its_share_of_the_slots_of_all_replicas(cluster: LocalCluster, bucket: Path) -> None:
    before = Counter(cluster.counts())
    with cluster.held():
        job_id = submitted(cluster, 150, "all")
        assert len(open_at(cluster, before, int(SHARE_OF_SLOTS * 2 * SLOTS))) == 2
    assert completed(cluster, job_id)["request_counts"] == {"total": 150, "completed": 150, "failed": 0}
    assert in_run(bucket, "all") == Counter(problem.id for problem in more(150))


@pytest.mark.process
def test_what_a_replica_knows_and_refuses_is_told_by_the_front(cluster: LocalCluster) -> None:
    tokenizer = httpx.get(f"{cluster.url}/v1/tokenizer").raise_for_status().content
    assert tokenizer == (DEMO / "expert" / "tokenizer.json").read_bytes()
    body = {"problems": [{"id": "long", "question": "? " * 300}], "max_tokens": 8}
    (line,) = httpx.post(f"{cluster.url}/v1/trajectories", json=body).raise_for_status().text.splitlines()
    assert json.loads(line)["error"]["type"] == "context_length_exceeded"


@pytest.mark.process
def test_a_client_that_leaves_frees_the_replicas_engines(cluster: LocalCluster) -> None:
    before, cancelled = Counter(cluster.counts()), sum(cluster.counts("cancelled").values())
    body = {"problems": [{"id": f"{index}", "question": "?"} for index in range(16)], "max_tokens": 8}

    async def leave() -> None:
        async with httpx.AsyncClient() as http:
            asking = asyncio.create_task(http.post(f"{cluster.url}/v1/trajectories", json=body, timeout=60))
            await asyncio.to_thread(open_at, cluster, before, 16)
            asking.cancel()

    with cluster.held():
        asyncio.run(leave())
        until(lambda: sum(cluster.counts("cancelled").values()) == cancelled + 16)


@pytest.mark.process
def test_a_cancelled_job_frees_the_replicas_engines(cluster: LocalCluster) -> None:
    before, cancelled = Counter(cluster.counts()), sum(cluster.counts("cancelled").values())
    with cluster.held():
        job_id = submitted(cluster, 150, "cancelled")
        count = open_at(cluster, before, int(SHARE_OF_SLOTS * 2 * SLOTS)).total()
        httpx.post(f"{cluster.url}/v1/jobs/{job_id}/cancel", timeout=60).raise_for_status()
        until(lambda: sum(cluster.counts("cancelled").values()) == cancelled + count)


@pytest.mark.process
def test_a_killed_replica_costs_its_requests_only(cluster: LocalCluster) -> None:
    """The front asks again what was at that replica, and nothing else: no client needs to."""
    before, count = Counter(cluster.counts()), 150
    with ThreadPoolExecutor() as pool:
        with cluster.held():
            found = pool.submit(answered, cluster, count)
            killed, lost = open_at(cluster, before, count).most_common(1)[0]
            cluster.kill(killed)
        assert found.result() == each_once(count)
    assert (Counter(cluster.counts()) - before).total() == count + lost


def test_a_replica_whose_engine_died_ends_at_once_and_waits_for_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would wait for the requests of a replica that only says that it is not well, and they wait for the engine."""
    replica: Any = object.__new__(PairReplica)
    replica.pair, ended = SimpleNamespace(failure=lambda: None, shutdown=lambda: None), []
    monkeypatch.setattr(os, "_exit", ended.append)
    asyncio.run(replica.check_health())
    assert ended == []
    replica.pair.failure = lambda: "the expert's engine died"
    asyncio.run(replica.check_health())
    assert ended == [1]
    del replica.pair


@pytest.mark.long
def test_a_replica_whose_engine_died_is_ended_and_its_requests_are_asked_elsewhere(cluster: LocalCluster) -> None:
    until(lambda: cluster.replicas() == 2, 120)
    (cluster.folder / "die").touch()
    assert answered(cluster, 250) == each_once(250)
    assert not (cluster.folder / "die").exists()


@pytest.mark.long
def test_a_job_goes_on_when_the_front_is_killed(cluster: LocalCluster, bucket: Path) -> None:
    job_id = submitted(cluster, 1500, "front")
    until(lambda: done(cluster, job_id) > 50)
    cluster.kill(cluster.pid_of("Front"))
    ended = completed(cluster, job_id)
    assert ended["request_counts"] == {"total": 1500, "completed": 1500, "failed": 0}
    assert in_run(bucket, "front") == Counter(problem.id for problem in more(1500))


@pytest.mark.long
def test_a_front_that_is_told_to_stop_hands_its_job_back(cluster: LocalCluster, bucket: Path) -> None:
    before = Counter(cluster.counts())
    with cluster.held():
        job_id = submitted(cluster, 150, "back")
        until(lambda: Counter(cluster.counts()) - before)
        cluster.end()
    (heartbeat,) = (bucket / "jobs" / job_id).glob("beat-*")
    assert json.loads(heartbeat.read_text())["released"] is True


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "no expert model"),
        ({"expert": "x", "amateur": "y"}, "an API key is needed"),
        ({"expert": "x", "amateur": "y", "host": "127.0.0.1", "min_replicas": 3, "max_replicas": 2}, "max_replicas 2"),
        ({"min_replicas": "two"}, "min_replicas 'two': expected a whole number"),
        ({"max_replicas": 0}, "max_replicas 0: expected"),
        ({"gpus": -1}, "gpus -1: expected"),
        ({"gpus": "all"}, "gpus 'all': expected a number"),
        ({"expert": "x", "amateur": "y", "host": "127.0.0.1", "replica": 3}, "unknown setting"),
    ],
)
def test_invalid_arguments_are_named_before_anything_starts(args: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        application(args)


@pytest.mark.parametrize(
    ("expert", "slots", "amateurs"),
    [
        ("x", 256, 256),
        ({"model": "x", "max_num_seqs": 64}, 64, 256),
        ({"model": "x", "max_num_seqs": 64, "data_parallel_size": 3}, 192, 256),
        ({"model": "x", "data_parallel_size": 3}, 768, 768),
        ({"model": "x", "max_num_seqs": 640}, 640, 640),
        ({"model": "x", "max_num_seqs": None}, 256, 256),
    ],
)
def test_ray_gives_a_replica_as_many_requests_as_its_engines_slots_allow(
    expert: Any, slots: int, amateurs: int
) -> None:
    """Ray's own builder; the replica starts its engines with the slots that Ray reckons with."""
    args = {"host": "127.0.0.1", "expert": expert, "amateur": "y", "min_replicas": 1, "max_replicas": 3}
    front = call_user_app_builder_with_args_if_necessary(application, args)
    pair = front._bound_deployment.init_args[1]._bound_deployment
    assert pair.max_ongoing_requests == 2 * slots
    assert pair._deployment_config.autoscaling_config.target_ongoing_requests == slots / 2
    settings = pair.init_args[0]
    engine = settings.expert
    assert engine["model"] == "x" and settings.amateur == {"model": "y", "max_num_seqs": amateurs}
    assert engine["max_num_seqs"] * engine.get("data_parallel_size", 1) == slots

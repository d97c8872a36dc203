"""The application on Ray Serve, at length: a node killed in a large job, scaling, many clients, real engines."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'lightreasoner[ray]'")

from support.cluster.cluster_jobs import completed, done, in_run, is_ready, submitted
from support.cluster.local_cluster import LocalCluster, local_cluster, until
from support.runs.sampled import keys, more, once, sampled
from support.servers.stand_in_engines import SLOTS

from client.protocol.requests import SamplingSettings, Trajectory
from server.cluster.replica import checked_and_started

pytestmark = pytest.mark.long


def test_a_node_killed_in_a_job_of_20_000_problems(tmp_path: Path) -> None:
    bucket = tmp_path / "bucket"
    with local_cluster(tmp_path, nodes=3) as cluster:
        cluster.serve(min_replicas=3, bucket=str(bucket), lease_seconds=2)
        until(lambda: is_ready(cluster), 300)
        job_id = submitted(cluster, 20_000, "run")
        until(lambda: done(cluster, job_id) > 5000, 600)
        asked = cluster.counts()
        assert len(asked) == 3 and max(asked.values()) < 1.5 * min(asked.values())
        cluster.cluster.remove_node(cluster.others[0], allow_graceful=False)
        until(lambda: any(not Path(f"/proc/{process}").exists() for process in asked), 60)
        ended = completed(cluster, job_id, 1200)
        assert ended["request_counts"] == {"total": 20_000, "completed": 20_000, "failed": 0}
        assert in_run(bucket, "run") == Counter(problem.id for problem in more(20_000))


def test_replicas_come_and_go_with_the_work(tmp_path: Path) -> None:
    """A job keeps three quarters of the slots in use, however slow this machine is: a trajectory takes 10 s."""
    with local_cluster(tmp_path) as cluster:
        soon = {"upscale_delay_s": 1.0, "downscale_delay_s": 1.0}
        cluster.serve(min_replicas=1, max_replicas=3, bucket=str(tmp_path / "bucket"), scaling=soon)
        until(lambda: is_ready(cluster), 300)
        assert cluster.replicas() == 1
        cards = httpx.get(f"{cluster.url}/v1/models").raise_for_status().json()["data"]
        assert [card["slots"] for card in cards] == [3 * SLOTS] * 2  # so that clients send enough for all three
        with cluster.held(10.0):
            job_id = submitted(cluster, 20_000, "run")
            until(lambda: cluster.replicas() == 3, 300)
            until(lambda: len(asked := cluster.counts()) == 3 and min(asked.values()) > SLOTS, 120)
            httpx.post(f"{cluster.url}/v1/jobs/{job_id}/cancel", timeout=60).raise_for_status()
            until(lambda: cluster.replicas() == 1, 300)
        body = {"problems": [{"id": "1", "question": "?"}], "max_tokens": 8, "top_k": 4}
        answer = httpx.post(f"{cluster.url}/v1/trajectories", json=body, timeout=60).raise_for_status()
        assert '"token_ids"' in answer.text


def test_streams_of_200_clients_of_whom_a_tenth_vanish(tmp_path: Path) -> None:
    async def ask(url: str, number: int) -> int:
        problems = [{"id": f"{number}-{index}", "question": "?"} for index in range(8)]
        body = {"problems": problems, "max_tokens": 32, "top_k": 4}
        seen = 0
        async with (
            httpx.AsyncClient(timeout=300) as http, http.stream("POST", f"{url}/v1/trajectories", json=body) as answer
        ):  # fmt: skip
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                seen += '"token_ids"' in line
                if number % 10 == 0 and seen == 2:
                    break
        return seen

    async def all_of_them(url: str) -> list[int]:
        async def later(number: int) -> int:
            await asyncio.sleep(random.uniform(0, 5))
            return await ask(url, number)

        return await asyncio.gather(*map(later, range(200)))

    with local_cluster(tmp_path) as cluster:
        cluster.serve(min_replicas=2)
        until(lambda: is_ready(cluster), 300)
        seen = asyncio.run(all_of_them(cluster.url))
        assert [count for number, count in enumerate(seen) if number % 10] == [8] * 180


@pytest.mark.parametrize("lost", ["a replica", "an engine"])
def test_real_engines_in_two_replicas_of_which_one_is_lost(tmp_path: Path, lost: str) -> None:
    def kill(lines: list[object]) -> None:
        if len(lines) == 20:
            cluster.kill(cluster.engine() if lost == "an engine" else cluster.pid_of("Pair"))

    problems = more(60)
    engine = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 64 * 1024**2, "max_num_seqs": 16}
    with local_cluster(tmp_path, real_engines=True) as cluster:
        cluster.serve(checked_and_started, min_replicas=2, **engines(cluster, engine))
        until(lambda: is_ready(cluster), 600)
        lines = sampled(cluster.url, problems, SamplingSettings(max_tokens=32), on_line=kill)
        assert keys(lines) == once(problems) and all(isinstance(line, Trajectory) for line in lines)


def engines(cluster: LocalCluster, engine: dict[str, object]) -> dict[str, str]:
    """A server.yaml with engine arguments."""
    file = cluster.folder / "server.yaml"
    file.write_text(f"{{expert: {engine}, amateur: {engine}}}")
    return {"config": str(file)}

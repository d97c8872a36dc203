"""Two servers on one bucket of a real S3 server: each job is done once, and none is lost with its owner."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
from support.servers.job_calls import ended, job, objects, owners, posted, questions, read_by_others, wait_until
from support.servers.real_server import DEMO, running_server

from client.runs.run import Run
from client.storage.bucket import Bucket

LEASE = 3


@pytest.fixture(scope="module")
def bucket(s3):
    return f"{s3}/replicas"


@pytest.fixture(scope="module")
def replicas(bucket, tmp_path_factory):
    """Both start at the same time."""
    settings, running = {"bucket": bucket, "lease_seconds": LEASE}, [None, None]
    stacks = [contextlib.ExitStack(), contextlib.ExitStack()]

    def start(index):
        folder = tmp_path_factory.mktemp(f"replica-{index}")
        models = DEMO / "expert", DEMO / "amateur"
        server = running_server(*models, folder, **settings)
        running[index] = stacks[index].enter_context(server)

    threads = [threading.Thread(target=start, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield running
    for stack in stacks:
        stack.close()


def took(replica, job_id):
    """Whether a server says in its log that it took a job."""
    return any("job taken" in line and job_id in line for line in replica.log.read_text().splitlines())


def working_on(replicas, job_id):
    """Of the replicas, the one that works on a job, and the other."""
    wait_until(lambda: any(took(replica, job_id) for replica in replicas), "an owner's word")
    mine = [replica for replica in replicas if took(replica, job_id)]
    assert len(mine) == 1
    return mine[0], next(replica for replica in replicas if replica is not mine[0])


def started(bucket, run):
    wait_until(lambda: Run(f"{bucket}/{run}").parts("samples"), "a part")


def test_each_job_is_done_once_and_every_replica_tells_the_same(replicas, bucket, tmp_path):
    problems = questions(120)
    ids = [posted(replicas[index % 2], f"runs/{index}", problems) for index in range(6)]
    for index, job_id in enumerate(ids):
        for replica in replicas:
            done = ended(replica, job_id)
            assert done["status"] == "completed" and done["run"] == f"{bucket}/runs/{index}"
        assert job(replicas[0], job_id) == job(replicas[1], job_id)
        assert owners(bucket, job_id) == ["owner-1"]
        assert "0 rows written twice" in read_by_others(done["run"], problems, tmp_path)
    assert all(sum(took(replica, job_id) for replica in replicas) == 1 for job_id in ids)
    assert sum(took(replicas[0], job_id) for job_id in ids) not in (0, 6)  # both took part
    listed = [httpx.get(f"{replica.url}/v1/jobs").json() for replica in replicas]
    assert listed[0] == listed[1] and [entry["id"] for entry in listed[0]["data"]] == ids[::-1]


def test_a_job_is_cancelled_through_another_replica(replicas, bucket):
    job_id = posted(replicas[0], "runs/cancelled", questions(2000))
    started(bucket, "runs/cancelled")
    _, other = working_on(replicas, job_id)
    httpx.post(f"{other.url}/v1/jobs/{job_id}/cancel")
    assert ended(other, job_id)["status"] == "cancelled"


def test_an_owner_that_sleeps_past_its_lease_stops_when_it_wakes_and_harms_nothing(replicas, bucket, tmp_path):
    problems = questions(1500)
    job_id = posted(replicas[0], "runs/slept", problems)
    started(bucket, "runs/slept")
    sleeper, other = working_on(replicas, job_id)
    sleeper.signal(signal.SIGSTOP)
    try:
        wait_until(lambda: "owner-2" in objects(bucket, job_id), "another owner")
        time.sleep(1.0)  # both have it in hand
    finally:
        sleeper.signal(signal.SIGCONT)
    done = ended(other, job_id)
    assert done["request_counts"] == {"total": 1500, "completed": 1500, "failed": 0}
    noticed = (f"{job_id}: another server has it", f"{job_id}: no heartbeat written")
    wait_until(lambda: any(words in sleeper.log.read_text() for words in noticed), "the sleeper to notice")
    end = Bucket(bucket).get(f"jobs/{job_id}/end.json")
    print(read_by_others(done["run"], problems, tmp_path))
    keys = [(line.problem_id, line.sample_index) for line in Run(done["run"]).trajectories()]
    assert len(keys) == len(set(keys)) == 1500
    assert objects(bucket, job_id).count("end.json") == 1 and owners(bucket, job_id)[:2] == ["owner-1", "owner-2"]
    assert ended(sleeper, posted(sleeper, "runs/after-sleep", questions(5)))["status"] == "completed"
    assert Bucket(bucket).get(f"jobs/{job_id}/end.json") == end and job(sleeper, job_id) == job(other, job_id)


def test_an_owner_whose_engine_dies_hands_its_job_to_another(replicas, bucket, tmp_path):
    """Last, for it leaves one replica without engines."""
    problems = questions(1500)
    job_id = posted(replicas[0], "runs/engine", problems)
    started(bucket, "runs/engine")
    victim, other = working_on(replicas, job_id)
    os.kill(engines_of(victim)[0], signal.SIGKILL)
    done = ended(other, job_id)
    assert done["status"] == "completed" and done["request_counts"]["completed"] == 1500
    assert '"released":true' in Bucket(bucket).get(f"jobs/{job_id}/beat-1").decode()
    assert "0 rows written twice" in read_by_others(done["run"], problems, tmp_path)


def test_a_server_that_is_told_to_stop_writes_what_was_answered_and_hands_its_job_back(replicas, bucket):
    survivor = next(replica for replica in replicas if httpx.get(f"{replica.url}/health").status_code == 200)
    job_id = posted(survivor, "runs/stopped", questions(5000))
    wait_until(lambda: job(survivor, job_id)["request_counts"]["completed"] > 0, "an answer")
    survivor.process.send_signal(signal.SIGTERM)
    survivor.process.wait(60)
    assert '"released":true' in Bucket(bucket).get(f"jobs/{job_id}/beat-1").decode()
    assert "end.json" not in objects(bucket, job_id)
    told = len(Run(f"{bucket}/runs/stopped").keys())
    assert 0 < told < 5000


def engines_of(server):
    """The engines' processes of a server, from /proc: children that vLLM names."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            name = (folder / "comm").read_text() + (folder / "cmdline").read_text()
            if int(fields[3]) == server.process.pid and "EngineCore" in name:
                found.append(int(folder.name))
    return sorted(found)

"""Two servers on one bucket of a real S3 server: each job is done once, and none is lost with its owner.

Their engines are stand-ins: what is claimed of jobs holds whatever answers. An owner whose real engine dies is in
tests/server/test_lifecycle.py.
"""

import signal
import time

import httpx
import pytest
from support.servers.job_calls import ended, job, objects, owners, posted, questions, read_by_others, wait_until
from support.servers.stand_in import stand_in_server

from client.runs.run import Run
from client.storage.bucket import Bucket

LEASE = 3


@pytest.fixture(scope="module")
def bucket(s3):
    return f"{s3}/replicas"


@pytest.fixture(scope="module")
def replicas(bucket, tmp_path_factory):
    settings = {"bucket": bucket, "lease_seconds": LEASE}
    folders = [tmp_path_factory.mktemp(f"replica-{index}") for index in range(2)]
    with stand_in_server(folders[0], **settings) as first, stand_in_server(folders[1], **settings) as second:
        yield [first, second]


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


def test_a_server_that_is_told_to_stop_writes_what_was_answered_and_hands_its_job_back(replicas, bucket):
    """Last, for it ends both replicas."""
    job_id = posted(replicas[0], "runs/stopped", questions(5000))
    owner, other = working_on(replicas, job_id)
    other.process.kill()
    wait_until(lambda: job(owner, job_id)["request_counts"]["completed"] > 0, "an answer")
    owner.process.send_signal(signal.SIGTERM)
    owner.process.wait(60)
    assert '"released":true' in Bucket(bucket).get(f"jobs/{job_id}/beat-1").decode()
    assert "end.json" not in objects(bucket, job_id)
    told = len(Run(f"{bucket}/runs/stopped").keys())
    assert 0 < told < 5000

"""How a job ends that brings nothing, or cannot be written. The pair is a stand-in that answers from memory: real
engines do not fail on demand."""

import asyncio
import threading
import time

import pytest
from support.runs.made_run import make_manifest, make_trajectory, tokenizer_json

import client.problems.reader
from client.protocol.requests import Failure, JobRequest
from client.runs.run import Run
from client.storage.bucket import Bucket, BucketError
from server.jobs import runner as jobs
from server.jobs.leases import Claimant
from server.jobs.runner import JobRunner
from server.jobs.store import JobStore
from server.settings import ServerSettings


class StandIn:
    """Answers the first sample of each problem, and fails the others as an engine does that was preempted."""

    asks_again = False

    def __init__(self, pair, versions):
        self.pair, self.stopping, self.asked = pair, False, 0

    def __str__(self):
        return "a stand-in"

    def stop(self):
        self.stopping = True

    async def wait_until_ready(self, tell):
        pass

    async def models(self):
        return make_manifest().expert, make_manifest().amateur

    async def tokenizer(self):
        return tokenizer_json()

    async def versions(self):
        return {}

    async def trajectories(self, problems, sampling):
        self.pair.attempts += 1
        for problem in problems:
            yield make_trajectory(problem.id, seed=1, tokens=4)
            for index in range(1, sampling.n):
                yield Failure(problem.id, index, "no_scores", "vLLM returned no scores, twice; try again")


class NoPair:
    """A pair that never fails, and counts the attempts at its jobs."""

    attempts = 0

    def failure(self):
        return None


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(jobs, "PairSource", StandIn)
    monkeypatch.setattr(jobs, "FIRST_JOB_PAUSE_SECONDS", 0.01)


async def until(condition):
    for _ in range(600):
        if condition():
            return
        await asyncio.sleep(0.05)
    pytest.fail("it does not come")


def ended(bucket, **fields):
    """The end of a job of three problems on a server that has only this one, and the attempts that it took."""
    problems = [{"id": f"p{index}", "question": "q"} for index in range(3)]
    request = JobRequest(problems=problems, run="r", top_k=8, **fields)

    async def go():
        pair, runner = NoPair(), JobRunner(str(bucket), ServerSettings(bucket=str(bucket)), {})
        job_id = runner.store.post(request, None, 10)
        runner.start(pair)
        await until(lambda: runner.store.job(job_id).status in ("completed", "failed"))
        await runner.drain(5)
        return runner.store.job(job_id), pair.attempts

    return asyncio.run(go())


def test_a_sample_that_never_comes_ends_the_job_and_does_not_write_the_others_again(quick, tmp_path):
    job, attempts = ended(tmp_path / "b", n=2, temperature=1.0)
    assert (job.status, job.error.type) == ("failed", "engine_error") and "3 trajectories failed" in job.error.detail
    assert attempts == 1 + jobs.MOST_JOB_ATTEMPTS  # the first brought half of them
    assert job.request_counts.model_dump() == {"total": 6, "completed": 3, "failed": 0}
    run = Run(str(tmp_path / "b" / "r"))
    assert len(run.parts("trajectories")) == 1 and len(run.keys()) == 3


def test_what_cannot_be_written_is_not_told_as_completed_and_ends_the_job(quick, tmp_path, monkeypatch):
    put = Bucket._put

    def full(self, name, data, overwrite):
        if name.startswith("trajectories/"):
            raise BucketError(f"cannot write {name}: No space left on device")
        put(self, name, data, overwrite)

    monkeypatch.setattr(Bucket, "_put", full)
    job, attempts = ended(tmp_path / "b")
    assert (job.status, job.error.type) == ("failed", "bucket_error") and "No space left" in job.error.detail
    assert attempts == jobs.MOST_JOB_ATTEMPTS and job.request_counts.completed == 0


def test_a_new_job_does_not_hurry_the_attempts_at_another(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "FIRST_JOB_PAUSE_SECONDS", 30.0)
    request = JobRequest(problems=[{"id": "a", "question": "q"}], run="r", top_k=8, n=2, temperature=1.0)

    async def go():
        bucket = str(tmp_path / "b")
        pair, runner = NoPair(), JobRunner(bucket, ServerSettings(bucket=bucket), {})
        runner.store.post(request, None, 10)
        runner.start(pair)
        for _ in range(40):
            runner.wake()
            await asyncio.sleep(0.05)
        await runner.drain(5)
        return pair.attempts

    assert asyncio.run(go()) == 1


async def all_ended(runner, pair, *job_ids):
    runner.start(pair)
    await until(lambda: all(runner.store.job(job_id).status in ("completed", "failed") for job_id in job_ids))
    await runner.drain(5)


def test_a_run_whose_parts_can_never_be_written_fails_at_the_first(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "FIRST_JOB_PAUSE_SECONDS", 60.0)
    bucket = tmp_path / "b"
    (bucket / "r").mkdir(parents=True)
    (bucket / "r" / "trajectories").write_text("a file")
    job, attempts = ended(bucket)
    assert (job.status, job.error.type, attempts) == ("failed", "bucket_error", 1)


def test_a_run_below_a_file_fails_at_once(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "FIRST_JOB_PAUSE_SECONDS", 60.0)
    bucket = tmp_path / "b"
    bucket.mkdir()
    (bucket / "r").write_text("a file")
    job, attempts = ended(bucket)
    assert (job.status, job.error.type, attempts) == ("failed", "bucket_error", 0)


def test_a_job_that_waits_for_another_attempt_lets_others_go_first(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "FIRST_JOB_PAUSE_SECONDS", 60.0)
    asked = {"problems": [{"id": "a", "question": "q"}], "top_k": 8}

    async def go():
        pair, runner = NoPair(), JobRunner(str(tmp_path / "b"), ServerSettings(bucket=str(tmp_path / "b")), {})
        stuck = runner.store.post(JobRequest(**asked, run="stuck", n=2, temperature=1.0), None, 10)
        await asyncio.sleep(0.002)
        others = [runner.store.post(JobRequest(**asked, run=f"other-{index}"), None, 10) for index in range(3)]
        await all_ended(runner, pair, *others)
        folder = runner.store.folder(stuck)
        return runner.store.job(stuck).status, folder.owner, runner.store.heartbeat(stuck, folder.owner), pair.attempts

    status, owner, heartbeat, attempts = asyncio.run(go())
    assert (status, owner, attempts) == ("in_progress", 1, 1 + 3)
    assert heartbeat.released and heartbeat.fruitless == 0  # another server may take it, and counts none against it


def test_a_job_that_waits_can_be_cancelled(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "FIRST_JOB_PAUSE_SECONDS", 60.0)
    request = JobRequest(problems=[{"id": "a", "question": "q"}], run="r", top_k=8, n=2, temperature=1.0)

    async def go():
        runner = JobRunner(str(tmp_path / "b"), ServerSettings(bucket=str(tmp_path / "b")), {})
        job_id = runner.store.post(request, None, 10)
        runner.start(NoPair())
        await until(lambda: runner._later)
        runner.store.cancel(job_id)
        await until(lambda: runner.store.job(job_id).status == "cancelled")
        await runner.drain(5)

    asyncio.run(go())


def test_a_job_whose_end_outlasts_the_grace_is_handed_back(quick, tmp_path, monkeypatch):
    released = threading.Event()
    sealing = threading.Event()

    def seal(self, *ended):
        sealing.set()
        released.wait(30)

    monkeypatch.setattr(Run, "seal", seal)
    bucket = str(tmp_path / "b")
    request = JobRequest(problems=[{"id": "a", "question": "q"}], run="r", top_k=8)

    async def go():
        runner = JobRunner(bucket, ServerSettings(bucket=bucket), {})
        job_id = runner.store.post(request, None, 10)
        runner.start(NoPair())
        await asyncio.to_thread(sealing.wait, 30)
        await runner.drain(0.2)
        second = Claimant(JobStore(bucket), 30).claim()  # at once: no lease has to run out
        released.set()
        return job_id, second

    job_id, second = asyncio.run(go())
    assert (second.job_id, second.owner) == (job_id, 2)


class Endless(StandIn):
    """Answers one problem, and is then busy with the next until it is told to stop."""

    async def trajectories(self, problems, sampling):
        self.pair.attempts += 1
        first, *_ = problems
        yield make_trajectory(first.id, seed=1, tokens=4)
        await until(lambda: self.stopping)


def test_what_was_answered_by_the_time_of_a_cancel_is_written(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PairSource", Endless)
    bucket = str(tmp_path / "b")
    request = JobRequest(problems=[{"id": name, "question": "q"} for name in "ab"], run="r", top_k=8)

    async def go():
        pair, runner = NoPair(), JobRunner(bucket, ServerSettings(bucket=bucket, lease_seconds=1), {})
        job_id = runner.store.post(request, None, 10)
        runner.start(pair)
        await until(lambda: pair.attempts)
        await asyncio.to_thread(runner.store.cancel, job_id)
        await until(lambda: runner.store.job(job_id).status == "cancelled")
        there = Run(f"{bucket}/r").keys()  # before the runner ends
        await runner.drain(5)
        return runner.store.job(job_id), there

    job, there = asyncio.run(go())
    assert there == {("a", 0)}
    assert job.request_counts.completed == 1


def test_an_owner_that_can_give_no_sign_of_life_stops_and_lets_others_take_the_job(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PairSource", Endless)
    bucket, written = str(tmp_path / "b"), JobStore.write_heartbeat
    failing = threading.Event()

    def write_heartbeat(self, *args):
        if failing.is_set():
            raise BucketError("no route to host")
        written(self, *args)

    monkeypatch.setattr(JobStore, "write_heartbeat", write_heartbeat)
    request = JobRequest(problems=[{"id": name, "question": "q"} for name in "ab"], run="r", top_k=8)

    async def go():
        pair, runner = NoPair(), JobRunner(bucket, ServerSettings(bucket=bucket, lease_seconds=1), {})
        runner.store.post(request, None, 10)
        runner.start(pair)
        await until(lambda: pair.attempts)
        failing.set()
        await until(lambda: Run(f"{bucket}/r").parts("trajectories"))  # written when it stopped
        stopped = Run(f"{bucket}/r").keys()
        failing.clear()
        await until(lambda: pair.attempts == 2)
        await runner.drain(5)
        return stopped, pair.attempts

    assert asyncio.run(go()) == ({("a", 0)}, 2)


@pytest.mark.parametrize(("n", "allowed"), [(1, True), (2, False)])
def test_the_bound_of_a_job_counts_trajectories(quick, tmp_path, n, allowed):
    bucket = tmp_path / "b"
    bucket.mkdir()
    (bucket / "set.jsonl").write_text('{"question": "a"}\n{"question": "b"}\n{"question": "c"}\n')
    request = JobRequest(problems_url="set.jsonl", run="r", top_k=8, n=n, temperature=1.0)
    settings = ServerSettings(bucket=str(bucket), limits={"job_trajectories": 5})

    async def go():
        runner = JobRunner(str(bucket), settings, {})
        runner.store.post(request, None, 10)
        job_id = runner.store.ids()[0]
        runner.start(NoPair())
        await until(lambda: runner.store.job(job_id).status in ("completed", "failed"))
        await runner.drain(5)
        return runner.store.job(job_id)

    job = asyncio.run(go())
    assert (job.status == "completed") is allowed
    assert allowed or "more than 2 problems" in job.error.detail


def test_a_job_without_trouble_is_done_at_the_first_attempt(quick, tmp_path):
    job, attempts = ended(tmp_path / "b")
    assert job.status == "completed" and attempts == 1
    assert job.request_counts.model_dump() == {"total": 3, "completed": 3, "failed": 0}


def test_a_server_that_is_told_to_stop_does_not_read_a_problem_set_to_its_end(quick, tmp_path, monkeypatch):
    """A set that takes minutes to read; the server hands the job back at once, as it is."""
    (tmp_path / "p.jsonl").write_text("".join(f'{{"question": "What is {index}?"}}\n' for index in range(2000)))
    reading, read = threading.Event(), []
    rows = client.problems.reader.rows

    def slowly(path, fields, stopped):
        for row in rows(path, fields, stopped):
            reading.set()
            read.append(row)
            time.sleep(0.05)
            yield row

    monkeypatch.setattr(client.problems.reader, "rows", slowly)

    async def go():
        runner = JobRunner(str(tmp_path), ServerSettings(bucket=str(tmp_path)), {})
        job_id = runner.store.post(JobRequest(problems_url="p.jsonl", run="r", top_k=8), None, 10)
        runner.start(NoPair())
        await until(reading.is_set)
        await runner.drain(20)
        assert runner.store.job(job_id).status == "validating" and 0 < len(read) < 100
        again = Claimant(runner.store, 30.0).claim()
        assert again and again.owner == 2  # at once: it was handed back

    asyncio.run(go())


def test_a_job_whose_problems_are_gone_fails_with_the_remedy(quick, tmp_path):
    async def go():
        runner = JobRunner(str(tmp_path), ServerSettings(bucket=str(tmp_path)), {})
        request = JobRequest(problems=[{"id": "a", "question": "q"}], run="r", top_k=8)
        job_id = runner.store.post(request, None, 10)
        (tmp_path / "jobs" / job_id / "problems.jsonl").unlink()
        runner.start(NoPair())
        await until(lambda: runner.store.job(job_id).status == "failed")
        await runner.drain(5)
        return runner.store.job(job_id).error

    error = asyncio.run(go())
    assert error.type == "problem_set_error" and "problems.jsonl is gone from the bucket" in error.detail

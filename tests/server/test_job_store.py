"""Jobs as objects, and who owns them: the same on a local folder and on a real S3 server. No engines."""

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from pydantic import ValidationError

import server.jobs.store
from client.protocol.requests import MAX_JOB_PROBLEMS, JobError, JobRequest, Problem, RequestCounts
from client.sampling.writer import Counts
from client.storage.bucket import Bucket
from server import metrics
from server.jobs import runner as jobs
from server.jobs.leases import MOST_FRUITLESS_OWNERS, Claimant, LeaseState
from server.jobs.store import JobStore, JobTooLarge, KeyReused, TooManyJobs

MANY = 1000
DONE = RequestCounts(total=1, completed=1)


def request(name="r", **fields):
    return JobRequest(**{"problems": [Problem(id="1", question="q")], "run": f"runs/{name}", **fields})


def post(store, name="r", key=None):
    return store.post(request(name), key, MANY)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def store(bucket):
    return JobStore(bucket)


def objects(store, job_id):
    return sorted(name.rpartition("/")[2] for name in store.bucket.names(f"jobs/{job_id}"))


def test_a_job_is_told_as_it_was_posted_and_its_problems_are_kept(store):
    problems = [
        Problem(id="a\u2028b", question="é\n\u0085?"),
        Problem(id="ids", prompt_token_ids=[1, 2], token_ids=[3]),
    ]
    job_id = store.post(request(problems=problems, alpha=0.3), None, MANY)
    job = store.job(job_id)
    assert (job.id, job.status, job.object) == (job_id, "validating", "job")
    assert job.run == f"{store.paths._root}/runs/r" and abs(job.created_at - time.time()) < 60
    assert job.request_counts == RequestCounts(total=2)
    record = store.record(job_id)
    assert record.alpha == 0.3 and record.run == "runs/r"
    assert list(store.problems(job_id, record, MANY)) == problems
    assert store.job("job-0000000000000-00000000") is None and store.job("../x") is None


@pytest.mark.parametrize("part", ["problems", "other fields"])
def test_a_job_that_could_not_be_read_again_is_refused_before_anything_is_written(store, monkeypatch, part):
    bound = "MOST_PROBLEMS_BYTES" if part == "problems" else "MOST_OBJECT_BYTES"
    monkeypatch.setattr(server.jobs.store, bound, 5000)
    long = {"problems": [Problem(id="a", question="?" * 9000)], "chat_template_kwargs": {"a": "x" * 6000}}
    with pytest.raises(JobTooLarge, match=rf"its {part} take \d,\d+ bytes"):
        store.post(request(**long), "key", MANY)
    assert not list(store.bucket.names("jobs"))
    monkeypatch.undo()
    assert store.record(store.post(request(**long), "key", MANY))


def test_pages_go_from_the_newest_to_the_oldest(store):
    ids = []
    for index in range(5):
        ids.append(post(store, str(index)))
        time.sleep(0.002)
    assert store.page(4, None)[1] and not store.page(5, None)[1]
    store.end(ids[3], "cancelled")
    store.bucket.create("jobs/job-0000000000001-00000000/problems.jsonl", b"")  # never became a job
    ids.reverse()
    page, more = store.page(2, None)
    assert [job.id for job in page] == ids[:2] and more
    page, more = store.page(2, page[-1].id)
    assert [job.id for job in page] == ids[2:4] and more
    page, more = store.page(2, page[-1].id)
    assert [job.id for job in page] == ids[4:] and not more  # the one that never became a job is no more


def test_a_key_makes_one_job_however_often_and_by_however_many_it_is_posted(store):
    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(lambda _: post(store, key="k"), range(8)))
    assert len(made) == 1 == len(store.ids())
    assert post(store, key="other") not in made
    (job_id,) = made
    with pytest.raises(KeyReused, match=job_id):
        store.post(request("another"), "k", MANY)
    with pytest.raises(KeyReused):
        store.post(request(alpha=0.3), "k", MANY)


def test_a_retry_writes_the_job_that_a_crash_left_out(store, monkeypatch):
    monkeypatch.setattr(store, "_write", lambda *_: None)
    job_id = post(store, key="k")
    monkeypatch.undo()
    assert store.job(job_id) is None and post(store, key="k") == job_id and store.job(job_id)


def test_only_so_many_jobs_are_open_and_a_retry_is_not_one_more(store, bucket):
    ids = [store.post(request(str(index)), f"key-{index}", 3) for index in range(3)]
    with pytest.raises(TooManyJobs):
        store.post(request("more"), None, 3)
    assert store.post(request("0"), "key-0", 3) == ids[0]
    JobStore(bucket).end(ids[0], "completed")  # by another server
    store.post(request("more"), None, 3)


def test_many_servers_do_each_job_once_oldest_first(store, bucket):
    ids = []
    for index in range(12):
        ids.append(post(store, str(index)))
        time.sleep(0.002)
    done = []

    def serve(_):
        claimant = Claimant(JobStore(bucket), 30)
        while claim := claimant.claim():
            done.append((claim.job_id, claim.owner))
            claim.complete(DONE)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(serve, range(6)))
    assert sorted(done) == [(job_id, 1) for job_id in ids]
    alone = post(store, "x"), time.sleep(0.002), post(store, "y")
    assert Claimant(store, 30).claim().job_id == alone[0]


def test_an_owner_is_taken_for_dead_when_its_beat_stands_still_for_a_lease_and_not_before(store, bucket):
    job_id, clock = post(store), Clock()
    first = Claimant(store, 30).claim()
    other = Claimant(JobStore(bucket), 30, clock)
    assert other.claim() is None
    clock.now = 29
    assert other.claim() is None
    assert first.renew() is LeaseState.HELD  # it changes, so the lease starts again
    clock.now = 58
    assert other.claim() is None
    clock.now = 89
    second = other.claim()
    assert (second.job_id, second.owner) == (job_id, 2)

    before = objects(store, job_id), store.bucket.get(f"jobs/{job_id}/beat-1")
    assert first.renew() is LeaseState.LOST
    first.release(stopping=True)
    first.fail(JobError(type="x", detail="late"))
    assert (objects(store, job_id), store.bucket.get(f"jobs/{job_id}/beat-1")) == before
    second.complete(DONE)
    assert store.job(job_id).status == "completed"
    assert "owner-3" not in objects(store, job_id) and other.claim() is None


def test_an_owner_that_died_before_its_first_beat_is_taken_for_dead_too(store):
    job_id, clock = post(store), Clock()
    assert store.take(job_id, 1)
    claimant = Claimant(store, 30, clock)
    assert claimant.claim() is None
    clock.now = 31
    assert claimant.claim().owner == 2


def test_a_job_that_was_handed_back_is_taken_at_once_and_goes_on_from_its_counts(store):
    job_id = post(store)
    first = Claimant(store, 30).claim()
    counts = RequestCounts(total=9, completed=5)
    first.state = first.state.model_copy(update={"phase": "in_progress", "in_progress_at": 7, "request_counts": counts})
    first.renew()
    first.release(stopping=True)
    second = Claimant(store, 30).claim()
    assert second.owner == 2 and first.renew() is LeaseState.LOST
    job = store.job(job_id)
    assert (job.status, job.in_progress_at, job.request_counts) == ("in_progress", 7, counts)
    assert Claimant(store, 30).claim() is None  # it is owned again


def test_an_owner_may_be_silent_for_its_own_lease_though_the_watcher_has_a_shorter_one(store, bucket):
    post(store)
    clock = Clock()
    Claimant(store, 90).claim()
    other = Claimant(JobStore(bucket), 30, clock)
    assert other.claim() is None
    clock.now = 89
    assert other.claim() is None
    clock.now = 91
    assert other.claim().owner == 2


def test_a_cancelled_job_of_a_dead_owner_is_ended_by_servers_that_take_none(store, bucket):
    job_id, clock = post(store), Clock()
    Claimant(store, 30).claim()
    uncancelled = post(store, "s")
    reaper = Claimant(JobStore(bucket), 30, clock)
    reaper.end_cancelled()
    store.cancel(job_id)
    reaper.end_cancelled()
    clock.now = 29
    reaper.end_cancelled()
    assert store.job(job_id).status == "cancelling"
    clock.now = 31
    reaper.end_cancelled()
    assert store.job(job_id).status == "cancelled"
    assert store.job(uncancelled).status == "validating" and JobStore(bucket).folder(uncancelled).owner == 0


def test_a_job_that_is_not_whole_is_neither_told_nor_taken(store):
    job_id = post(store)
    store.bucket.create("jobs/job-0000000000001-00000000/problems.jsonl", b"")
    assert Claimant(store, 30).claim().job_id == job_id
    assert store.job("job-0000000000001-00000000") is None


def test_a_queued_job_is_cancelled_at_once_and_an_owned_one_by_its_owner(store):
    queued = post(store)
    assert store.cancel(queued).status == "cancelled"
    assert Claimant(store, 30).claim() is None
    owned = post(store, "s")
    claim = Claimant(store, 30).claim()
    job = store.cancel(owned)
    assert job.status == "cancelling" and job.cancelling_at
    assert claim.renew() is LeaseState.CANCELLED
    claim.fail(JobError(type="x", detail="at the same time"))
    job = store.job(owned)
    assert job.status == "cancelled" and job.cancelled_at and job.cancelling_at and job.error is None
    assert store.cancel(owned) == job


def test_no_cancel_is_lost_between_a_job_and_its_first_owner(store, bucket):
    """Both orders happen; in each, the job ends as cancelled."""
    taken = 0
    for index in range(25):
        job_id, together = post(store, str(index)), threading.Barrier(2)

        def claim(together=together):
            claimant = Claimant(JobStore(bucket), 30)
            together.wait()
            return claimant.claim()

        def cancel(job_id=job_id, together=together, late=index % 5 * 0.002):
            other = JobStore(bucket)
            together.wait()
            time.sleep(late)
            other.cancel(job_id)

        with ThreadPoolExecutor(2) as pool:
            claiming, cancelling = pool.submit(claim), pool.submit(cancel)
            mine, _ = claiming.result(), cancelling.result()
        if mine:
            taken += 1
            assert mine.renew() in (LeaseState.CANCELLED, LeaseState.LOST)
            mine.cancelled()
        assert store.job(job_id).status == "cancelled"
    print(f"{taken} of 25 were taken before they were cancelled")


def test_the_first_end_stands_and_is_counted_once(store):
    def counted():
        name, statuses = "lightreasoner_jobs_ended_total", ({"status": "completed"}, {"status": "failed"})
        return [metrics.OURS.get_sample_value(name, status) or 0.0 for status in statuses]

    before, job_id = counted(), post(store)
    assert store.end(job_id, "completed") and not store.end(job_id, "failed") and not store.end(job_id, "completed")
    assert store.job(job_id).status == "completed"
    assert counted() == [before[0] + 1, before[1]]


def test_a_problem_set_in_the_bucket_is_read_from_there(store, bucket):
    Bucket(bucket).put("sets/p.jsonl", b'{"id": "1", "question": "a"}\n{"id": "2", "question": "b"}\n')
    job_id = store.post(request(problems=None, problems_url="sets/p.jsonl"), None, MANY)
    record = store.record(job_id)
    assert [problem.id for problem in store.problems(job_id, record, MANY)] == ["1", "2"]
    assert len(store.problems(job_id, record, 1)) == 2  # one more than allowed is enough to refuse it


def test_what_is_open_are_whole_jobs_that_have_not_ended(store, bucket):
    ids = [post(store, str(index)) for index in range(3)]
    store.bucket.create("jobs/job-0000000000001-00000000/problems.jsonl", b"")  # a post that a crash cut short
    store.cancel(ids[0])
    Claimant(store, 30).claim()
    store.bucket.create(f"jobs/{ids[2]}/cancel", b"1")
    fresh = JobStore(bucket)
    assert {status: count for status, count in fresh.open_by_status().items() if count} == {
        "validating": 1,
        "cancelling": 1,
    }
    fresh.post(request("more"), None, 3)
    with pytest.raises(TooManyJobs):
        fresh.post(request("more"), None, 3)


def test_a_server_that_starts_does_not_look_at_jobs_that_have_ended(store, bucket, monkeypatch):
    ids = [post(store, str(index)) for index in range(4)]
    for job_id in ids[:3]:
        store.end(job_id, "completed")
    looked, folder = [], JobStore.folder
    monkeypatch.setattr(JobStore, "folder", lambda self, job_id: looked.append(job_id) or folder(self, job_id))
    fresh = JobStore(bucket)
    assert fresh.unfinished() == [ids[3]] and Claimant(fresh, 30).claim().job_id == ids[3]
    assert set(looked) == {ids[3]}


def test_a_job_that_ends_its_servers_is_given_up_and_one_of_servers_that_were_told_to_stop_is_not(store):
    unlucky = post(store)
    for _ in range(20):
        Claimant(store, 30).claim().release(stopping=True)
    for _ in range(MOST_FRUITLESS_OWNERS):
        Claimant(store, 30).claim().release(stopping=False)
    assert Claimant(store, 30).claim() is None
    job = store.job(unlucky)
    assert (
        job.status == "failed"
        and job.error.type == "engine_error"
        and "5 servers in a row took this job" in job.error.detail
    )


def test_an_owner_that_adds_to_the_run_lets_the_count_begin_anew(store):
    job_id = post(store)
    for owner in range(3 * MOST_FRUITLESS_OWNERS):
        claim = Claimant(store, 30).claim()
        if owner % 3 == 0:
            jobs.JobProgress(claim).update(Counts(total=9, done=1, written=1))
        claim.release(stopping=False)
    assert store.job(job_id).status == "in_progress"


@pytest.mark.parametrize("name", ["job.json", "beat-1"])
def test_a_damaged_job_keeps_no_other_waiting_and_hides_none(store, bucket, name):
    damaged = post(store, "damaged")
    Claimant(store, 30).claim().release(stopping=False)
    time.sleep(0.002)
    other = post(store, "other")
    store.bucket.put(f"jobs/{damaged}/{name}", b"{")
    fresh = JobStore(bucket)
    assert Claimant(fresh, 30).claim().job_id == other
    assert [job.id for job in fresh.page(10, None)[0]] == [other]


@pytest.mark.parametrize("name", ["job.json", "beat-1", "cancel", "end.json"])
@pytest.mark.parametrize("damage", ["pipe", "huge"])
def test_an_object_that_has_no_end_keeps_no_other_waiting_and_hides_none(tmp_path, name, damage):
    store = JobStore(str(tmp_path))
    damaged = post(store, "damaged")
    Claimant(store, 30).claim().release(stopping=False)
    time.sleep(0.002)
    other = post(store, "other")
    path = tmp_path / "jobs" / damaged / name
    path.unlink(missing_ok=True)
    if damage == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(2**36)
    fresh = JobStore(str(tmp_path))
    assert other in {job.id for job in fresh.page(10, None)[0]}
    assert fresh.open_by_status()["validating"] >= 1 and post(fresh, "third")
    Claimant(fresh, 30).end_cancelled()
    claims = iter(Claimant(fresh, 30).claim, None)
    assert other in {claim.job_id for claim in claims}
    marker = f"jobs/idempotency/{hashlib.sha256(b'key').hexdigest()}"
    (tmp_path / marker).parent.mkdir()
    path.replace(tmp_path / marker)
    with pytest.raises(KeyReused, match="damaged marker"):
        post(fresh, key="key")


@pytest.mark.parametrize("garbage", [b"", b"soon", b"\xff", b"9" * 5000, b"-1", b"1e9"])
def test_garbage_in_a_cancel_is_a_cancel_all_the_same(store, bucket, garbage):
    damaged = post(store, "damaged")
    time.sleep(0.002)
    other = post(store, "other")
    store.bucket.put(f"jobs/{damaged}/cancel", garbage)
    fresh = JobStore(bucket)
    assert {job.id: job.status for job in fresh.page(10, None)[0]} == {damaged: "cancelling", other: "validating"}
    assert fresh.open_by_status()["cancelling"] == 1
    assert Claimant(fresh, 30).claim().job_id == other and fresh.job(damaged).status == "cancelled"


def test_a_damaged_beat_leaves_the_open_jobs_counted(store, bucket):
    damaged, _ = post(store, "damaged"), post(store, "other")
    store.bucket.put(f"jobs/{damaged}/beat-1", b"{")
    assert sum(JobStore(bucket).open_by_status().values()) == 2


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"id": 3, "body": "x"}', b'{"id": "../x", "body": "x"}'])
def test_a_damaged_idempotency_marker_is_named_and_another_key_helps(store, garbage):
    store.post(request("first"), "key", MANY)
    (marker,) = store.bucket.names("jobs/idempotency")
    store.bucket.put(marker, garbage)
    with pytest.raises(KeyReused, match=marker):
        store.post(request("first"), "key", MANY)
    store.post(request("second"), "another", MANY)


def test_a_job_of_a_later_version_is_done_as_far_as_it_is_understood(store, bucket):
    job_id = post(store)
    record = store.bucket.get(f"jobs/{job_id}/job.json").replace(b"{", b'{"of_tomorrow": 1, ', 1)
    store.bucket.put(f"jobs/{job_id}/job.json", record)
    assert Claimant(JobStore(bucket), 30).claim().job_id == job_id


def test_a_request_carries_only_so_many_problems():
    problems = [{"id": str(index), "question": "q"} for index in range(MAX_JOB_PROBLEMS + 1)]
    assert len(JobRequest(problems=problems[:-1], run="r").problems) == MAX_JOB_PROBLEMS
    with pytest.raises(ValidationError, match="at most 50000"):
        JobRequest(problems=problems, run="r")

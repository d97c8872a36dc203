"""Jobs on a server with a local bucket: what they write, what is refused, cancelling, and servers that are killed."""

import gzip
import json
import os
import random
import shutil
import time
from functools import partial

import pytest
from support.models.oracle import Oracle, first_tie
from support.servers.job_calls import ended, job, objects, owners, post, posted, questions, read_by_others, wait_until
from support.servers.real_server import command
from support.servers.restarting import LEASE_SECONDS, OPEN_JOBS, Restarting
from support.servers.stand_in import stand_in_server

from client.protocol.requests import MAX_JOB_PROBLEMS
from client.runs.run import Run


@pytest.fixture
def server(service):
    return service


@pytest.fixture
def bucket(service_bucket):
    return service_bucket


@pytest.fixture(scope="module")
def problem_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("problems") / "p.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in questions(150)))
    return file


def by_hand(*arguments, server):
    return command("client", *arguments, *server.options)


def test_submit_and_wait_write_what_sample_writes(server, bucket, problem_file, tmp_path):
    said = by_hand("submit", problem_file, "runs/first", "--max-tokens", 48, server=server)
    assert said.returncode == 0, said.stderr
    job_id = said.stdout.removesuffix("\n")
    assert len(job_id) >= 8 and len(job_id.split()) == 1
    waited = by_hand("wait", job_id, server=server)
    assert waited.returncode == 0 and f"{job_id} completed: 150 of 150, 0 failed" in waited.stdout
    told = json.loads(by_hand("status", job_id, server=server).stdout)
    assert told["status"] == "completed" and told["run"] == f"{bucket}/runs/first" and told["error"] is None
    assert told["request_counts"] == {"total": 150, "completed": 150, "failed": 0}
    times = [told[f"{name}_at"] for name in ("created", "in_progress", "finalizing", "completed")]
    assert times == sorted(times)
    assert told["failed_at"] is told["cancelled_at"] is told["cancelling_at"] is None

    sampled = by_hand("sample", problem_file, tmp_path / "run", "--max-tokens", 48, server=server)
    assert sampled.returncode == 0, sampled.stderr
    mine, theirs = Run(told["run"]), Run(str(tmp_path / "run"))
    assert mine.manifest().identity() == theirs.manifest().identity()
    assert mine.manifest().versions == theirs.manifest().versions
    expert, others = Oracle(server.expert), {line.problem_id: line for line in theirs.trajectories()}
    assert len(others) == 150 == len(list(mine.samples()))
    for line in mine.trajectories():
        certain = first_tie(expert, line)
        assert line.token_ids[:certain].tolist() == others.pop(line.problem_id).token_ids[:certain].tolist()
    assert not others
    assert all(part.split("-")[2] == "1" for part in mine.parts("samples"))  # the owner's number
    assert "150 problems once" in read_by_others(told["run"], questions(150), tmp_path)


def test_problems_may_be_token_ids_and_completions(server):
    first = next(Run(job(server, posted_and_done(server, "runs/asked", questions(1)))["run"]).trajectories())
    prompt, completion = first.prompt_token_ids.tolist(), first.token_ids.tolist()
    problems = [
        {"id": "prompt", "prompt_token_ids": prompt},
        {"id": "both", "prompt_token_ids": prompt, "token_ids": completion},
        {"id": "given", "question": questions(1)[0]["question"], "token_ids": completion},
    ]
    done = posted_and_done(server, "runs/ids", problems)
    lines = {line.problem_id: line for line in Run(job(server, done)["run"]).trajectories()}
    assert sorted(lines) == ["both", "given", "prompt"]
    assert all(line.token_ids.tolist() == completion for line in lines.values())


def posted_and_done(server, run, problems, **fields):
    job_id = posted(server, run, problems, **fields)
    assert ended(server, job_id)["status"] == "completed"
    return job_id


def test_a_problem_set_in_the_bucket_is_named_by_its_url(server, bucket):
    (bucket / "sets").mkdir()
    with gzip.open(bucket / "sets" / "p.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in questions(5))
    for number, url in enumerate(("sets/p.jsonl.gz", f"{bucket}/sets/p.jsonl.gz", f"file://{bucket}/sets/p.jsonl.gz")):
        job_id = posted(server, f"{bucket}/runs/by-url-{number}", None, problems_url=url)
        assert ended(server, job_id)["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
    said = by_hand("submit", f"file://{bucket}/sets/p.jsonl.gz", "runs/by-url-0", "--max-tokens", 48, server=server)
    assert ended(server, said.stdout.strip())["status"] == "completed"  # the RUN is sealed: nothing to do


@pytest.mark.parametrize(
    ("run", "fields", "kind", "words"),
    [
        ("runs/first", {"alpha": 0.3}, "run_error", "alpha: 0.2 against 0.3"),
        ("runs/bad-1", {"problems": None, "problems_url": "sets/none.jsonl"}, "problem_set_error", "no problem set at"),
        ("runs/bad-2", {"problems": None, "problems_url": "sets/bad.jsonl"}, "problem_set_error", "bad.jsonl:1: no "),
        ("runs/bad-3", {"problems": None, "problems_url": "sets/many.jsonl"}, "problem_set_error", "more than 9,000"),
        ("runs/long", {"problems": [{"id": "x", "question": "apples " * 300}]}, "run_error", "context of 256"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_done_fails_and_says_why(server, bucket, problem_file, run, fields, kind, words):
    (bucket / "sets" / "bad.jsonl").write_text('{"text": "q"}\n')
    (bucket / "sets" / "many.jsonl").write_text("".join(f'{{"question": "{n}?"}}\n' for n in range(9001)))
    problems = questions(150) if run == "runs/first" else None
    job_id = posted(server, run, **{"problems": problems, **fields})
    failed = ended(server, job_id)
    assert failed["status"] == "failed" and failed["failed_at"] and failed["completed_at"] is None
    assert failed["error"]["type"] == kind and words in failed["error"]["detail"]
    waited = by_hand("wait", job_id, server=server)
    assert waited.returncode == 1 and words in waited.stderr and "Traceback" not in waited.stderr


def test_a_problem_that_fails_alone_is_counted(server):
    problems = [*questions(3), {"id": "long", "question": "apples " * 300}]
    done = job(server, posted_and_done(server, "runs/one-failed", problems))
    assert done["request_counts"] == {"total": 4, "completed": 3, "failed": 1}


def test_the_same_key_makes_one_job(server):
    first = post(server, "runs/key", questions(2), key="k-1")
    assert first.status_code == 202 and first.headers["location"] == f"/v1/jobs/{first.json()['id']}"
    again = post(server, "runs/key", questions(2), key="k-1")
    assert again.status_code == 202 and again.json()["id"] == first.json()["id"]
    other = post(server, "runs/key", questions(3), key="k-1")
    assert other.status_code == 422 and "Idempotency-Key" in other.json()["detail"]
    ended(server, first.json()["id"])


def test_jobs_are_listed_in_pages_newest_first(server):
    ids, after = [], {}
    while True:
        page = server.ask("GET", "/v1/jobs", params={"limit": 3, **after}).json()
        assert page["object"] == "list" and len(page["data"]) <= 3
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        ids += [entry["id"] for entry in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert ids == sorted(ids, reverse=True) and len(set(ids)) == len(ids) >= 10
    assert server.ask("GET", "/v1/jobs", params={"limit": 100}).json()["has_more"] is False
    for wrong in ({"limit": 0}, {"limit": 101}, {"after": "x"}):
        assert server.ask("GET", "/v1/jobs", params=wrong).status_code == 422


def test_running_and_queued_jobs_are_cancelled_and_too_many_are_refused(server, bucket):
    """One slow job, and others that wait behind it until there is no more room."""
    running = posted(server, "runs/slow", questions(2000), n=4, temperature=1.0)
    queued = [posted(server, f"runs/queued-{index}", questions(1)) for index in range(OPEN_JOBS - 1)]
    refused = post(server, "runs/one-more", questions(1))
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert (
        refused.headers["content-type"] == "application/problem+json" and "4 jobs are open" in refused.json()["detail"]
    )

    first = server.ask("POST", f"/v1/jobs/{queued[-1]}/cancel").json()
    assert first["status"] == "cancelled" and first["request_counts"] == {"total": 1, "completed": 0, "failed": 0}
    assert owners(bucket, queued[-1]) == [] and job(server, queued[-1]) == first

    wait_until(lambda: Run(f"{bucket}/runs/slow").parts("samples"), "a part")
    assert job(server, running)["status"] == "in_progress"
    body = {"problems": questions(1), "max_tokens": 48}
    assert server.ask("POST", "/v1/trajectories", json=body).text.count("finish_reason") == 1
    assert job(server, running)["status"] == "in_progress"  # the request did not wait for the job
    said = by_hand("cancel", running, server=server)
    assert said.returncode == 0 and said.stdout.startswith((f"{running} cancelling: ", f"{running} cancelled: "))
    cancelled = ended(server, running)
    assert cancelled["status"] == "cancelled" and cancelled["cancelled_at"] and cancelled["cancelling_at"]
    assert cancelled["request_counts"]["total"] == 8000
    run = Run(f"{bucket}/runs/slow")
    assert 0 < len(run.keys()) < 8000 and run.completion() is None
    assert server.ask("POST", f"/v1/jobs/{running}/cancel").json() == cancelled
    assert by_hand("wait", running, server=server).returncode == 1
    for job_id in queued[:-1]:
        assert ended(server, job_id)["status"] == "completed"
    assert server.ask("POST", f"/v1/jobs/{queued[0]}/cancel").status_code == 409


def test_nothing_outside_the_bucket_can_be_named(server, bucket, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"question": "secret"}\n')
    (bucket / "link").symlink_to(tmp_path)
    (bucket / "link.jsonl").symlink_to(tmp_path / "p.jsonl")
    before = sorted(tmp_path.iterdir()), len(list((bucket / "jobs").iterdir()))
    hostile = [
        str(tmp_path), f"{tmp_path}/p.jsonl", f"file://{tmp_path}/p.jsonl", "/etc/passwd", "file:///etc/passwd", "..",
        "../x",
        "x/../../y", f"{bucket}/../x", f"{bucket}", f"{bucket}/", f"{bucket}-2/x", f"{bucket}/.", ".", "./x", "/", "//",
        "x//y", "%2e%2e/x", f"file://{bucket}/%2e%2e/x", "file://localhost/etc/passwd", "file://evil/x",
        "http://127.0.0.1/x",
        "https://example.org/p.jsonl", "ftp://x/y", "s3://other/x", "gs://x/y", "memory:///x", "hf://x/y", "jobs",
        "jobs/x",
        f"{bucket}/jobs/x", "JOBS/x", "link", "link/x", "link/p.jsonl", "link.jsonl", f"{bucket}/link/x", "x\x00",
        "x\ny",
        "~/x", "$HOME", "a\\b", "-rf", "\uff0e\uff0e/x", "x" * 300,
    ]  # fmt: skip
    for given in hostile:
        for field, response in (
            ("run", post(server, given, questions(1))),
            ("problems_url", post(server, "runs/hostile", None, problems_url=given)),
        ):
            assert response.status_code == 422, (given, response.text)
            assert [entry["field"] for entry in response.json()["errors"]] == [field]
            assert "secret" not in response.text
    assert (sorted(tmp_path.iterdir()), len(list((bucket / "jobs").iterdir()))) == before
    assert not (bucket / "runs" / "hostile").exists()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"problems": None}, "body"),
        ({"problems_url": "sets/p.jsonl.gz"}, "body"),
        ({"problems": []}, "problems"),
        ({"problems": [{"id": "a", "question": "q"}] * 2}, "body"),
        ({"problems": [{"id": str(n), "question": "q"} for n in range(9001)]}, "problems"),
        ({"top_k": 111}, "top_k"),
        ({"alpha": 0}, "alpha"),
        ({"n": 2}, "body"),
        ({"encoding": "json"}, "encoding"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize"),
        ({"run": None}, "run"),
        ({"run": ""}, "run"),
    ],
)
def test_a_job_that_is_not_valid_is_refused_naming_the_field(server, fields, field):
    body = {"problems": [{"id": "a", "question": "q"}], "run": "runs/x", **fields}
    response = server.ask("POST", "/v1/jobs", json=body)
    assert response.status_code == 422 and response.headers["content-type"] == "application/problem+json"
    assert field in [entry["field"] for entry in response.json()["errors"]]


def test_unknown_and_damaged_jobs_and_a_server_without_a_bucket(server, demo_server, bucket):
    for method, path in (("GET", ""), ("POST", "/cancel")):
        for job_id in ("job-0000000000000-00000000", "nothing", "..%2f..%2fx"):
            response = server.ask(method, f"/v1/jobs/{job_id}{path}")
            assert response.status_code == 404 and response.headers["content-type"] == "application/problem+json"
    damaged = bucket / "jobs" / "job-0000000000001-00000000"
    damaged.mkdir(parents=True)
    (damaged / "job.json").write_text("{")
    for method, path in (("GET", ""), ("POST", "/cancel")):
        response = server.ask(method, f"/v1/jobs/{damaged.name}{path}")
        assert response.status_code == 500 and damaged.name in response.json()["detail"]
        assert "damaged" in response.json()["detail"]
    shutil.rmtree(damaged)
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/x"), ("POST", "/x/cancel")):
        response = demo_server.ask(method, f"/v1/jobs{path}")
        assert response.status_code == 501 and "--bucket" in response.json()["detail"]
    said = by_hand("status", "nothing", server=server)
    assert said.returncode == 1 and "there is no job 'nothing'" in said.stderr


def test_a_set_too_large_for_a_request_is_not_sent(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{index}"}}\n' for index in range(MAX_JOB_PROBLEMS + 1)))
    said = command("client", "submit", rows, "r", "--server", "http://127.0.0.1:9")
    assert said.returncode == 1 and "more than 50,000 problems" in said.stderr and "bucket" in said.stderr
    said = command("client", "submit", rows, "r", "--server", "http://127.0.0.1:9", "--limit", 2)
    assert said.returncode == 1 and "more than" not in said.stderr


def killed_and_restarted(times, longest, server, bucket, folder, capsys):
    """Each time in another job, after a while that is drawn: `longest` seconds at most."""
    seed = int(os.environ.get("SEED") or random.SystemRandom().randrange(10**6))
    delays, problems = random.Random(seed), questions(800)
    with capsys.disabled():
        print(f"\nkills at delays of SEED={seed}", flush=True)
    for kill in range(times):
        job_id, delay = posted(server, f"runs/killed-{times}-{kill}", problems), delays.uniform(0.0, longest)
        run = Run(f"{bucket}/runs/killed-{times}-{kill}")
        time.sleep(delay)
        server.kill()
        there, unfinished = len(run.keys()), "end.json" not in objects(bucket, job_id)
        server.start()
        done = ended(server, job_id)
        assert done["status"] == "completed", done
        assert done["request_counts"] == {"total": 800, "completed": 800, "failed": 0}
        assert len(owners(bucket, job_id)) == (2 if unfinished else 1)
        found = read_by_others(run, problems, folder)
        with capsys.disabled():
            print(f"killed after {delay:.2f} s with {there} there: {found.strip()}", flush=True)
        assert there == 0 or "parts, 0 rows written twice" in found  # only what was missing was done again


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=[pytest.mark.long, pytest.mark.timeout(7200)])])
def test_a_killed_server_goes_on_where_its_run_stands(server, bucket, tmp_path, capsys, kills):
    killed_and_restarted(kills, 6.0, server, bucket, tmp_path, capsys)


def test_a_server_that_is_killed_again_and_again_goes_on_where_its_runs_stand(tmp_path, capsys):
    """Stand-ins for engines start in a second, so that it can be killed at more moments of a job."""
    bucket = tmp_path / "bucket"
    settings = {"bucket": str(bucket), "lease_seconds": LEASE_SECONDS}
    server = Restarting(partial(stand_in_server, tmp_path, **settings))
    try:
        killed_and_restarted(3, 3.0, server, bucket, tmp_path, capsys)
    finally:
        server.close()

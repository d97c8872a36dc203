"""Shared by the tests of jobs: posting a job over HTTP, waiting for it, looking into the bucket."""

from __future__ import annotations

import json
import subprocess
import sys
import time

from word_problems import rows

from client.storage.bucket import Bucket
from support.servers.real_server import ROOT

JOB_SECONDS = 240


def questions(count, first=0):
    return [{"id": row["id"], "question": row["question"]} for row in list(rows("dev", first + count))[first:]]


def post(server, run, problems, key=None, **fields):
    headers = {"idempotency-key": key} if key else {}
    body = {"problems": problems, "run": run, "max_tokens": 48, **fields}
    return server.ask("POST", "/v1/jobs", json=body, headers=headers)


def posted(server, run, problems, **fields):
    response = post(server, run, problems, **fields)
    assert response.status_code == 202, response.text
    return response.json()["id"]


def job(server, job_id):
    response = server.ask("GET", f"/v1/jobs/{job_id}")
    assert response.status_code == 200, response.text
    return response.json()


def wait_until(true, what):
    deadline = time.monotonic() + JOB_SECONDS
    while not (value := true()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.05)
    return value


def ended(server, job_id):
    ends = ("completed", "failed", "cancelled")
    return wait_until(lambda: (found := job(server, job_id))["status"] in ends and found, f"{job_id} to end")


def objects(bucket, job_id):
    return [name.rpartition("/")[2] for name in Bucket(str(bucket)).names(f"jobs/{job_id}")]


def owners(bucket, job_id):
    return [name for name in objects(bucket, job_id) if name.startswith("owner-")]


def read_by_others(run, problems, folder):
    """The output of tests/support/runs/read_bucket.py on a RUN, which must not fail."""
    file = folder / "asked.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    script = ROOT / "tests" / "support" / "runs" / "read_bucket.py"
    said = subprocess.run([sys.executable, script, str(run), file], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    return said.stdout

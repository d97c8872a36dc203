"""The whole documented API under thousands of made-up requests: every answer is one that the document names.

Schemathesis makes the requests, valid and not, from the server's own OpenAPI document.
"""

import os
import subprocess
import sys
from collections import Counter

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.servers.real_server import DEMO, running_server

REQUESTS = 5000
KEY = "a-key-for-the-tests"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demo pair with a bucket and a key; its queue is short, for some requests ask for very much."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "keys").write_text(KEY)
    limits = {"queued_trajectories": 200, "open_jobs": 20}
    with running_server(
        DEMO / "expert", DEMO / "amateur", folder,
        bucket=str(folder / "bucket"), api_key_file=str(folder / "keys"), limits=limits,
    ) as server:  # fmt: skip
        yield server


def test_every_answer_is_documented(server, tmp_path):
    seed = int(os.environ.get("SCHEMATHESIS_SEED", "20"))
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {KEY}", "--checks", CHECKS, "--max-examples", "1000", "--seed", str(seed),
        "--workers", "2", "--continue-on-failure", "--request-timeout", "60", "--warnings", "off",
        "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all",
    ]  # fmt: skip
    print("seed", seed)
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    print(said.stdout[-6000:], said.stderr[-2000:])
    assert said.returncode == 0
    answered = answers(server)
    print(sum(answered.values()), "requests")
    assert sum(answered.values()) >= REQUESTS
    for path, status in (
        ("/v1/trajectories", "200"), ("/v1/trajectories", "422"),
        ("/v1/jobs", "202"), ("/v1/jobs", "422"), ("/v1/jobs/{job_id}", "404"),
    ):  # fmt: skip
        assert answered[path, status] > 0, (path, status, answered)
    assert httpx.get(f"{server.url}/ready").status_code == 200


def answers(server):
    """How many requests the server has answered, by path and status."""
    text = httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    found = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "lightreasoner_http_requests_total":
                found[sample.labels["path"], sample.labels["status"]] += int(sample.value)
    return found

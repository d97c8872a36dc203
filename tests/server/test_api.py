"""The whole documented API under thousands of made-up requests: every answer is one that the document names.

Schemathesis makes the requests, valid and not, from the server's own OpenAPI document.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,unsupported_method,ignored_auth"
)


@pytest.fixture
def server(service):
    """Jobs that were asked for are cancelled in the end, so that others have room."""
    yield service
    for job in service.ask("GET", "/v1/jobs", params={"limit": 100}).json()["data"]:
        service.ask("POST", f"/v1/jobs/{job['id']}/cancel")


@pytest.mark.parametrize(("requests", "examples"), [(1000, 150), pytest.param(5000, 1000, marks=pytest.mark.long)])
def test_every_answer_is_documented(server, tmp_path, requests, examples):
    before = answers(server)
    seed = int(os.environ.get("SCHEMATHESIS_SEED", "20"))
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
        "--header", f"Authorization: Bearer {server.key}", "--checks", CHECKS, "--max-examples", str(examples),
        "--seed", str(seed), "--workers", "2", "--continue-on-failure", "--request-timeout", "60", "--warnings", "off",
        "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all",
    ]  # fmt: skip
    print("seed", seed)
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=800)
    print(said.stdout[-6000:], said.stderr[-2000:])
    assert said.returncode == 0
    answered = answers(server) - before
    print(sum(answered.values()), "requests")
    assert sum(answered.values()) >= requests
    for path, status in (
        ("/v1/trajectories", "200"), ("/v1/trajectories", "422"),
        ("/v1/jobs", "202"), ("/v1/jobs", "422"), ("/v1/jobs/{job_id}", "404"),
    ):  # fmt: skip
        assert answered[path, status] > 0, (path, status, answered)
    assert server.ask("GET", "/ready").status_code == 200


def answers(server):
    """How many requests the server has answered, by path and status."""
    text = server.ask("GET", "/metrics").text
    found = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "lightreasoner_http_requests_total":
                found[sample.labels["path"], sample.labels["status"]] += int(sample.value)
    return found

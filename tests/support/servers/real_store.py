"""A real S3 server for the tests: SeaweedFS from PyPI, in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from support.servers.real_server import free_port

BUCKET = "samples"
KEYS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret123"}
START_SECONDS = 60
PARTS = ("admin", "filer", "master", "volume", "s3")


@contextlib.contextmanager
def running_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Start the server with an empty bucket. Yields the variables with which `s3://samples/…` refers to it."""
    ports = {part: free_port() for part in PARTS}
    command = [Path(sys.executable).with_name("weed"), "-logtostderr", "mini", f"-dir={folder}", f"-bucket={BUCKET}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"]
    for part, port in ports.items():
        command += [f"-{part}.port={port}", f"-{part}.port.grpc={free_port()}"]
    url = f"http://127.0.0.1:{ports['s3']}"
    log = folder / "weed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            list(map(str, command)), stdout=output, stderr=output, cwd=folder, env={**os.environ, **KEYS}
        )
    environment = {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_REGION": "us-east-1"}
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _has_bucket(environment):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start:\n{log.read_text()[-3000:]}")
            time.sleep(0.2)
        yield environment
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _has_bucket(environment: dict[str, str]) -> bool:
    """Whether a put succeeds. The port opens some time before the bucket exists."""
    from obstore.store import S3Store

    with contextlib.suppress(httpx.HTTPError):
        httpx.get(environment["AWS_ENDPOINT_URL"])
        store = S3Store(
            BUCKET,
            endpoint=environment["AWS_ENDPOINT_URL"],
            access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region="us-east-1",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        with contextlib.suppress(Exception):
            store.put("started", b"")
            return True
    return False

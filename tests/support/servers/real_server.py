"""Real servers and commands for the tests: each server a process of its own, with real vLLM engines, on a free port."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from server import watchdog
from support.processes.forked import ROOT, Forked, fork_server, run

DEMO = ROOT / "deploy" / "demo"
SHARED_DATA = ROOT.parent / "shared" / "data"
SMOLLM2 = ROOT / ".cache" / "smollm2"
START_SECONDS = 300
ENGINE_TITLE = "VLLM::EngineCor"
"""In what vLLM calls an engine's process; the end may be cut off."""


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready, and the two model folders it serves."""

    url: str
    expert: Path
    amateur: Path
    log: Path
    process: subprocess.Popen[bytes] | Forked
    key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What every request needs."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def options(self) -> list[str]:
        """What every command of the client needs."""
        return ["--server", self.url, *(["--api-key", self.key] if self.key else [])]

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        """One request."""
        return httpx.request(method, self.url + path, headers=self.headers | (headers or {}), timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples whose labels are these."""
        families = text_string_to_metric_families(self.ask("GET", "/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def signal(self, number: int) -> None:
        """To the server and its engines, as one group of processes."""
        os.killpg(self.process.pid, number)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running_server(
    expert: Path,
    amateur: Path,
    folder: Path,
    dtype: str | None = "float32",
    max_model_len: int | None = None,
    expert_arguments: dict[str, Any] | None = None,
    amateur_arguments: dict[str, Any] | None = None,
    port: int | None = None,
    cache_bytes: int | None = 256 * 1024**2,
    key: str | None = None,
    environment: Mapping[str, str] | None = None,
    imported: bool = False,
    **settings: Any,
) -> Iterator[RunningServer]:
    """Start a server through its public command, with a server.yaml, and wait until it is ready.

    `settings`: more of server.yaml, beside the engines' sections. `cache_bytes`: of each engine's cache; small, for
    several servers share the machine's memory. `key`: which requests need. `environment`: more variables than this
    process has. `imported`: a fork in place of the public command, ready in a third of the time (`servers.imported`).
    """
    port, log, config = port or free_port(), folder / "server.log", folder / "server.yaml"
    every = {"dtype": dtype, "kv_cache_memory_bytes": cache_bytes, "max_model_len": max_model_len}
    engine = {name: value for name, value in every.items() if value is not None}
    sections = {"expert": engine | (expert_arguments or {}), "amateur": engine | (amateur_arguments or {}), **settings}
    if key:
        (folder / "keys").write_text(key)
        sections["api_key_file"] = str(folder / "keys")
    config.write_text(json.dumps(sections))  # JSON is YAML
    words = list(map(str, ["--config", config, "--port", port, "--expert", expert, "--amateur", amateur]))
    with log.open("a") as output:
        if imported:
            v2 = (os.environ | (environment or {})).get("VLLM_USE_V2_MODEL_RUNNER") == "1"
            process: subprocess.Popen[bytes] | Forked = fork_server("v2" if v2 else "server").fork(
                "support.servers.imported:main", ["lightreasoner-server", *words], environment, output.fileno(),
                session=True,
            )  # fmt: skip
        else:
            process = subprocess.Popen(
                [sys.executable, "-m", "server", *words], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, env={**os.environ, **(environment or {})},
            )  # fmt: skip
    with watched(RunningServer(f"http://127.0.0.1:{port}", expert, amateur, log, process, key)) as server:
        yield server


@contextlib.contextmanager
def watched(server: RunningServer) -> Iterator[RunningServer]:
    """Wait until a server that was started is ready; kill it in the end, and its engines."""
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{server.url}/ready").status_code == 200:
                    break
            if server.process.poll() is not None or time.monotonic() > deadline:
                said = server.log.read_text(errors="replace")[-4000:]
                raise AssertionError(f"the server did not become ready:\n{said}")
            time.sleep(0.1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)  # ending in good order takes 5 s; test_lifecycle tries that
        server.process.wait()


def children_of(server):
    """A server's own child processes: the engines' and the watchdog's among them."""
    threads = Path(f"/proc/{server.process.pid}/task").iterdir()
    return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]


def sockets_of(server):
    """Where a server's own Unix sockets lie."""
    held = {str(opened.readlink()) for opened in Path(f"/proc/{server.process.pid}/fd").iterdir()}
    every = map(str.split, Path("/proc/net/unix").read_text().splitlines())
    return [Path(line[7]) for line in every if len(line) == 8 and f"socket:[{line[6]}]" in held]


def mark_of(server):
    """The mark that a server's engine processes carry."""
    entries = [entry for pid in children_of(server) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    return next(entry for entry in entries if entry.startswith(watchdog.MARK))


def is_engine(pid):
    """Is it an engine's process? vLLM gives it a title."""
    try:
        return ENGINE_TITLE in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return False


def processes_of(session):
    """Processes in a session that are no zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(folder.name))
    return found


def engine_processes(server):
    """Those of both engines, the expert's first."""
    return sorted(filter(is_engine, processes_of(server.process.pid)))


def command(package: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run one of the public commands to its end, as `command('client', 'sample', …)`. Only the trainer's is no fork."""
    if package != "trainer":
        return run(package, *words, environment={"COLUMNS": "200"})
    text = [sys.executable, "-m", package, *map(str, words)]
    return subprocess.run(
        text, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=600
    )

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
"""Part of the title that vLLM gives an engine's process. The end of a title may be cut off."""


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
        """The headers that every request needs."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def options(self) -> list[str]:
        """The options that every command of the client needs."""
        return ["--server", self.url, *(["--api-key", self.key] if self.key else [])]

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, **options: Any) -> httpx.Response:
        """Send one request."""
        return httpx.request(method, self.url + path, headers=self.headers | (headers or {}), timeout=60, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        families = text_string_to_metric_families(self.ask("GET", "/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())

    def signal(self, number: int) -> None:
        """Send a signal to the server and its engines, which are one process group."""
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

    `settings`: more keys of server.yaml, beside the engines' sections. `cache_bytes`: size of each engine's cache;
    small, because several servers share the machine's memory. `key`: the API key that requests need. `environment`:
    variables in addition to this process's. `imported`: start a fork in place of the public command, which is ready in
    a third of the time (`servers.imported`).
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
    """Wait until a started server is ready. At the end kill the server and its engines."""
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
            os.killpg(server.process.pid, signal.SIGKILL)  # an orderly end takes 5 s; test_lifecycle tests it
        server.process.wait()


def children_of(server):
    """The ids of a server's child processes, including those of the engines and the watchdog."""
    threads = Path(f"/proc/{server.process.pid}/task").iterdir()
    return [int(pid) for thread in threads for pid in (thread / "children").read_text().split()]


def sockets_of(server):
    """The paths of a server's own Unix sockets."""
    held = {str(opened.readlink()) for opened in Path(f"/proc/{server.process.pid}/fd").iterdir()}
    every = map(str.split, Path("/proc/net/unix").read_text().splitlines())
    return [Path(line[7]) for line in every if len(line) == 8 and f"socket:[{line[6]}]" in held]


def mark_of(server):
    """The mark that a server's engine processes carry."""
    entries = [entry for pid in children_of(server) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0")]
    return next(entry for entry in entries if entry.startswith(watchdog.MARK))


def is_engine(pid):
    """Whether a process is an engine's, by the title that vLLM gives it."""
    try:
        return ENGINE_TITLE in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has ended
        return False


def processes_of(session):
    """The processes of a session, without zombies."""
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
    """The processes of both engines, the expert's first."""
    return sorted(filter(is_engine, processes_of(server.process.pid)))


def command(package: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a public command to its end, as `command('client', 'sample', …)`. All but the trainer's are forks."""
    if package != "trainer":
        return run(package, *words, environment={"COLUMNS": "200"})
    text = [sys.executable, "-m", package, *map(str, words)]
    return subprocess.run(
        text, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=600
    )

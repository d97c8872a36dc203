"""Servers, and a `sample` command, with stand-in engines (`stand_in_engines`); a server whose engines never start."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from server.api.app import create_app
from server.api.guard import ApiKeys, Guard
from server.api.serving import DrainingServer
from server.settings import ServerSettings
from support.processes.forked import Forked, fork_server
from support.servers.real_server import DEMO, RunningServer, free_port, watched


@contextlib.contextmanager
def stand_in_server(folder: Path, port: int | None = None, **settings: Any) -> Iterator[RunningServer]:
    """Start a server of the demo's pair, with these settings in its server.yaml, and wait until it is ready."""
    port, config, log = port or free_port(), folder / "server.yaml", folder / "server.log"
    config.write_text(json.dumps(settings))
    words = ["lightreasoner-server", "--config", config, "--port", port]
    words += ["--expert", DEMO / "expert", "--amateur", DEMO / "amateur"]
    with log.open("a") as output:
        process = fork_server("server").fork(
            "support.servers.stand_in_engines:main", words, output=output.fileno(), session=True
        )
    with watched(RunningServer(f"http://127.0.0.1:{port}", DEMO / "expert", DEMO / "amateur", log, process)) as server:
        yield server


def stand_in_sample(*words: object, environment: Mapping[str, str] | None = None) -> Forked:
    """Start `lightreasoner-server sample` with the demo's pair and these arguments."""
    said = ["lightreasoner-server", "sample", *words, "--expert", DEMO / "expert", "--amateur", DEMO / "amateur"]
    return fork_server("server").fork("support.servers.stand_in_engines:main", said, environment, session=True)


BODY_BYTES = 50_000
"""The largest body that `serving` accepts."""


@contextlib.contextmanager
def serving(keys: Sequence[str] = (), **settings: Any) -> Iterator[httpx.Client]:
    """Serve the application behind its guard from a thread. It needs no engine: its engines never finish starting."""

    def start_pair(stopping: threading.Event) -> Any:
        stopping.wait()
        raise RuntimeError("told to stop")

    chosen = ServerSettings(**settings)
    application = create_app(chosen, start_pair, lambda error: None)
    service, bodies = application.state.service, chosen.limits.all_bodies_bytes
    guarded = Guard(application, ApiKeys(list(keys)), BODY_BYTES, lambda: service.draining, bodies)
    server = DrainingServer(guarded, lambda: service.drain(1.0))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as client:
            client.service = service  # type: ignore[attr-defined]
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()

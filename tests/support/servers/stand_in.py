"""Servers with stand-ins for engines (`stand_in_engines`), which are ready in a second."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.processes.forked import fork_server
from support.servers.real_server import DEMO, RunningServer, free_port, watched


@contextlib.contextmanager
def stand_in_server(folder: Path, port: int | None = None, **settings: Any) -> Iterator[RunningServer]:
    """Start one that serves the demo's pair, with a server.yaml of these settings, and wait until it is ready."""
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

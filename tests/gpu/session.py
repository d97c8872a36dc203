"""Shared by the parts of a check: the pair, a server with default settings, a RUN sampled from it.

In: a pair and sizes. Out: server and RUN, each made once, and `Figures` that a part fills. On a CPU the server has a
bounded cache and float32, as in the tests; on a GPU all settings are the server's defaults.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from gpu.card import Card, Look, apart
from gpu.pairs import ModelPair
from support.servers.real_server import RunningServer, command, running_server
from word_problems import rows

TOP_K = 20
KEPT = 0.16
"""Share of the steps to keep: 20 of 128, as with the paper's pairs. Models with random weights differ at every step."""
T = TypeVar("T")


@dataclass(frozen=True)
class Sizes:
    """Problems to sample, most tokens of an answer, and trajectories that transformers recomputes."""

    problems: int
    tokens: int
    compared: int


@dataclass
class Figures:
    """Rows (name, value, target) of a part's table, and the claims that did not hold."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, name: str, value: float | str, target: str = "") -> None:
        self.rows.append((name, value if isinstance(value, str) else f"{value:.4g}", target))

    def claim(self, holds: bool, said: str) -> None:
        if not holds:
            self.failed.append(said)


class Session:
    """One pair's check."""

    def __init__(self, pair: ModelPair, card: Card, sizes: Sizes, folder: Path) -> None:
        self.pair, self.card, self.sizes, self.folder = pair, card, sizes, folder
        self.start_seconds = self.sample_seconds = 0.0
        self.slots = 0  # of the shared server's expert
        self.start_looks: list[Look] = []
        self.problems = folder / "problems.jsonl"
        self._servers = contextlib.ExitStack()
        self._server: RunningServer | None = None
        self._run: Path | None = None
        self._number = 0

    def __enter__(self) -> Session:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.problems.write_text("".join(json.dumps(row) + "\n" for row in self.questions(self.sizes.problems)))
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def questions(self, count: int) -> list[dict[str, str]]:
        return [{"id": row["id"], "question": row["question"]} for row in rows("dev", count)]

    @contextlib.contextmanager
    def server(self, **changes: Any) -> Iterator[RunningServer]:
        """Start another server. `changes`: arguments of `running_server`. Stops the shared server first."""
        self.stop()
        self._number += 1
        folder = self.folder / f"server-{self._number}"
        folder.mkdir()
        defaults = {"dtype": None, "cache_bytes": None} if self.card.cuda else {"cache_bytes": 256 * 1024**2}
        with running_server(self.pair.expert, self.pair.amateur, folder, **{**defaults, **changes}) as server:
            yield server

    @property
    def shared(self) -> RunningServer:
        """The server with default settings; it runs until a part needs the card for itself."""
        if self._server is None:
            began = time.monotonic()
            with self.card.watched() as self.start_looks:
                self._server = self._servers.enter_context(self.server())
            self.start_seconds = time.monotonic() - began
            self.slots = self._server.ask("GET", "/v1/models").json()["data"][0]["slots"]
        return self._server

    def adopt(self, server: RunningServer) -> None:
        """Use a server that runs already. The session does not stop it."""
        self._server = server

    def stop(self) -> None:
        """Stop the shared server, and wait until the GPU is free."""
        self._servers.close()
        self._server = None
        self.card.wait_until_free()

    def apart(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function that computes on the device; on a GPU in a process of its own."""
        return apart(function, *arguments) if self.card.cuda else function(*arguments)

    def sample(self, run: Path, clients: int = 1, server: RunningServer | None = None) -> float:
        """Fill a RUN with `clients` clients, from the shared server or `server`. Returns the seconds."""
        words = ["--max-tokens", self.sizes.tokens, "--top-k", TOP_K, *(server or self.shared).options]
        said: list[Any] = []

        def one(number: int) -> None:
            shard = ["--shard", f"{number}/{clients}"] if clients > 1 else []
            said.append(command("client", "sample", self.problems, run, *words, *shard))

        threads = [threading.Thread(target=one, args=(number + 1,)) for number in range(clients)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        assert all(answer.returncode == 0 for answer in said), "\n".join(answer.stderr[-1000:] for answer in said)
        return seconds

    @property
    def run(self) -> Path:
        """A RUN of all problems."""
        if self._run is None:
            self.sample_seconds = self.sample(self.folder / "run")
            self._run = self.folder / "run"
        return self._run

    @property
    def kept(self) -> Path:
        """The same RUN with as many kept steps as with a real pair, for training."""
        kept = self.folder / "kept"
        if not kept.exists():
            said = command("client", "build", self.run, kept, "--select", "top", "--keep", KEPT)
            assert said.returncode == 0, said.stderr
        return kept

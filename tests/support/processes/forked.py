"""Starts commands as forks of a process that has imported their package. A test uses a `Forked` like a Popen.

A fork runs the same `main` as `python -m PACKAGE` does, with its own arguments, environment, working folder, output and
signals: only the imports are done before. If a test is about the start itself, use `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import os
import pickle
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.engines.forkserver import PRELOADED as ENGINES_PRELOADED
from support.v2 import ON_PATH, V2_ON_CPU

ROOT = Path(__file__).parents[3]
PATH = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "deploy" / "demo")))}
"""The environment in which a new process finds the modules that tests import."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""No library may start a thread in a process that forks."""
PRELOADED = {
    "client": (),
    "trainer": (
        "transformers.models.llama.modeling_llama", "transformers.trainer", "torch.distributed.run",
        "support.training.one_step", "support.training.sharded",
    ),
    "server": (*ENGINES_PRELOADED, "support.servers.stand_in_engines", "support.servers.imported"),
    "v2": (*ENGINES_PRELOADED, "support.v2.kernels", "support.servers.imported"),
}  # fmt: skip
"""Modules that a fork server imports before its package. `v2`: the package `server`, in the environment of `V2`."""
V2 = V2_ON_CPU | {"PYTHONPATH": os.pathsep.join((str(ON_PATH), PATH["PYTHONPATH"]))}
FIRST = {"FORKED_BY_TESTS": "1"}
"""The first variable of the fork server and of its children. If it changed, they could not set their titles."""
MAIN = {"server": "support.servers.imported:main"}
"""The function that a package's command calls, if it is not `main`."""


class Forked:
    """A process that was forked for a test, with the methods of Popen that tests use."""

    def __init__(self, words: Sequence[str], output: int, errors: int | None, status: int) -> None:
        self.args, self.returncode = words, None
        self.stdout = os.fdopen(output, encoding="utf-8", errors="replace")
        self.stderr = None if errors is None else os.fdopen(errors, encoding="utf-8", errors="replace")
        self._status = os.fdopen(status)
        self.pid = int(self._status.readline() or 0)
        if not self.pid:
            raise RuntimeError("the fork server has died; its last words are above")

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        """Wait for the end of the process. Returns all that it writes from now on: (stdout, stderr)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        said: dict[io.TextIOWrapper, str] = {}
        readers = []
        for stream in filter(None, (self.stdout, self.stderr)):
            readers.append(threading.Thread(target=lambda s=stream: said.update({s: s.read()}), daemon=True))
            readers[-1].start()
        for reader in readers:
            reader.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return said[self.stdout], None if self.stderr is None else said[self.stderr]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The connection to the fork server of one package. All processes of a test run share that server."""

    def __init__(self, package: str) -> None:
        self._lock, self._socket = threading.Lock(), socket.socket(socket.AF_UNIX)
        # A name without a file: it is free again when the server has ended.
        run = (os.environ["PYTEST_XDIST_TESTRUNUID"], os.getppid()) if is_worker() else (os.getpid(),)
        address = "\0" + "-".join(map(str, ("lightreasoner", *run, package)))
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(address)
            except OSError:  # another process of this run has started the server
                pass
            else:
                listener.listen()
                start(package, listener)
        while self._socket.connect_ex(address):  # the address is bound; the server listens in a moment
            time.sleep(0.01)
        atexit.register(self._socket.close)  # the server ends with its last client; its forks live on

    def fork(
        self,
        function: str,
        words: Sequence[object],
        environment: Mapping[str, str] | None = None,
        output: int | None = None,
        one_stream: bool = False,
        session: bool = False,
        file_bytes: int | None = None,
    ) -> Forked:
        """Fork a child that runs `function` ('module:name') with `words` as its arguments.

        `output`: an open file for both of its streams; None: two pipes, or one with `one_stream`. `session`: the child
        leads a session of its own. `file_bytes`: the size of the largest file that the child may write.
        """
        said = [str(word) for word in words]
        asked = {
            "function": function, "words": said, "session": session, "file_bytes": file_bytes, "folder": str(ROOT),
            "environment": {**FIRST, **os.environ, **(environment or {})},
        }  # fmt: skip
        body = pickle.dumps(asked)
        reading, writing = os.pipe() if output is None else (os.open(os.devnull, os.O_RDONLY), os.dup(output))
        errors, erring = (None, os.dup(writing)) if one_stream or output is not None else os.pipe()
        status, telling = os.pipe()
        with self._lock, contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._socket, [len(body).to_bytes(8)], [writing, erring, telling])
            self._socket.sendall(body)
        for theirs in (writing, erring, telling):
            os.close(theirs)
        return Forked(said, reading, errors, status)


def is_worker() -> bool:
    """Whether this process is one of several that run the tests."""
    return "PYTEST_XDIST_WORKER" in os.environ


def start(package: str, listener: socket.socket) -> None:
    """Start the fork server of a package, which imports all of the package."""
    folder, environment = ("server", V2) if package == "v2" else (package, {})
    modules = [module.name for module in pkgutil.walk_packages([str(ROOT / folder)], f"{folder}.")]
    subprocess.Popen(
        [sys.executable, Path(__file__).with_name("fork_server.py"), str(listener.fileno()), *PRELOADED[package],
         *modules],
        env={**FIRST, **os.environ, **PATH, **ONE_THREAD, **environment}, stdin=subprocess.DEVNULL,
        pass_fds=[listener.fileno()], cwd=ROOT,
    )  # fmt: skip


@functools.cache
def fork_server(package: str) -> ForkServer:
    """The fork server of a package. It starts when a process of this test run first asks for it."""
    return ForkServer(package)


def fork(package: str, *words: object, **options) -> Forked:
    """Start `lightreasoner-PACKAGE WORDS` as a fork."""
    command = [f"lightreasoner-{package}", *words]
    return fork_server(package).fork(MAIN.get(package, f"{package}.__main__:main"), command, **options)


def run(package: str, *words: object, timeout: float = 600, **options) -> subprocess.CompletedProcess[str]:
    """Run `lightreasoner-PACKAGE WORDS` as a fork, to its end."""
    process = fork(package, *words, **options)
    try:
        output, errors = process.communicate(timeout)
    finally:
        process.kill()
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

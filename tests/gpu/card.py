"""The device that is checked, as nvidia-smi tells of it; on a CPU, what /proc tells of the engines' processes.

nvidia-smi names no process to who looks from a container, so memory is that of whole GPUs: nothing else may use them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import TypeVar

MIB = 1024**2
LOOK_SECONDS = 0.5
TICKS = os.sysconf("SC_CLK_TCK")
BACK_SECONDS, LEFT = 10.0, 256 * MIB
"""After this long an ended server's memory is back, but for so much that the driver keeps."""
T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """At all GPUs at one moment: mean utilisation in percent, bytes in use. 0 where the driver does not say."""

    time: datetime
    busy: float
    used: int


class Card:
    """`device`: cuda or cpu."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device == "cuda"
        self._free = self.used()

    @property
    def name(self) -> str:
        if not self.cuda:
            return f"{platform.machine()}, {len(os.sched_getaffinity(0))} CPU cores"
        names = _nvidia("--query-gpu=name,memory.total")
        return f"{len(names)} x {names[0]}"

    @property
    def count(self) -> int:
        return len(_nvidia("--query-gpu=index")) if self.cuda else 1

    def used(self) -> int:
        """Bytes of all GPUs in use, whoever holds them; 0 on a CPU."""
        return _look().used if self.cuda else 0

    def held_by(self, pids: Iterable[int]) -> int:
        """Bytes that servers hold: of the GPUs, or of memory, where they are these processes'."""
        if self.cuda:
            return max(0, self.used() - self._free)
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def free_again(self) -> bool:
        """Is all memory back that was free at first?"""
        return self.used() <= self._free + LEFT

    def wait_until_free(self) -> None:
        """Whoever starts next finds the memory of who has ended."""
        deadline = time.monotonic() + BACK_SECONDS
        while not self.free_again() and time.monotonic() < deadline:
            time.sleep(0.1)

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Look]]:
        """The GPUs, looked at while the block runs; empty on a CPU."""
        seen: list[Look] = []
        done = threading.Event()

        def look() -> None:
            while self.cuda and not done.wait(LOOK_SECONDS):
                seen.append(_look())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its threads, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def apart(function: Callable[..., T], *arguments: object) -> T:
    """Its result, from a process of its own: none of the GPU's memory stays behind, where PyTorch would keep it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _look() -> Look:
    rows = [line.split(", ") for line in _nvidia("--query-gpu=utilization.gpu,memory.used")]
    busy, used = ([int(said) if said.isdecimal() else 0 for said in column] for column in zip(*rows, strict=True))
    return Look(datetime.now(UTC), fmean(busy), sum(used) * MIB)


def _nvidia(*query: str) -> list[str]:
    said = subprocess.run(
        ["nvidia-smi", *query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    )
    return said.stdout.splitlines()

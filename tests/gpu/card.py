"""The device to check, as nvidia-smi reports it; on a CPU, what /proc reports about the engines' processes.

In a container nvidia-smi names no processes. So memory is that of whole GPUs, and nothing else may use them.
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
"""Seconds within which an ended server's memory is free again, and the bytes that the driver may keep."""
T = TypeVar("T")


@dataclass(frozen=True)
class Look:
    """All GPUs at one moment: mean utilisation in percent, bytes in use. 0 if the driver does not report it."""

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
        """Bytes that servers hold: on the GPUs, or on a CPU the memory of these processes."""
        if self.cuda:
            return max(0, self.used() - self._free)
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def free_again(self) -> bool:
        """Whether all memory that was free at first is free again."""
        return self.used() <= self._free + LEFT

    def wait_until_free(self) -> None:
        """Wait until the memory of ended processes is free, for at most `BACK_SECONDS`."""
        deadline = time.monotonic() + BACK_SECONDS
        while not self.free_again() and time.monotonic() < deadline:
            time.sleep(0.1)

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[Look]]:
        """A list that fills with looks at the GPUs while the block runs; on a CPU it stays empty."""
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
    """Call a function in a process of its own: PyTorch keeps GPU memory until its process ends."""
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

"""The device that is checked, as nvidia-smi tells of it; on a CPU, what /proc tells of the engines' processes."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean

MIB = 1024**2
LOOK_SECONDS = 0.5
TICKS = os.sysconf("SC_CLK_TCK")


class Card:
    """`device`: cuda or cpu."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = device, device == "cuda"

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
        return sum(int(line) for line in _nvidia("--query-gpu=memory.used")) * MIB if self.cuda else 0

    def held_by(self, pids: Iterable[int]) -> int:
        """Bytes that processes hold: of the GPU, or of memory."""
        wanted = set(pids)
        if self.cuda:
            rows = [line.split(", ") for line in _nvidia("--query-compute-apps=pid,used_memory")]
            return sum(int(held) for pid, held in rows if int(pid) in wanted and held.isdecimal()) * MIB
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in wanted)
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[int]]:
        """The GPUs' utilisation in percent, looked at while the block runs; empty on a CPU."""
        seen: list[int] = []
        done = threading.Event()

        def look() -> None:
            while self.cuda and not done.wait(LOOK_SECONDS):
                seen.append(round(fmean(int(line) for line in _nvidia("--query-gpu=utilization.gpu"))))

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


def _nvidia(*query: str) -> list[str]:
    said = subprocess.run(
        ["nvidia-smi", *query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True
    )
    return said.stdout.splitlines()

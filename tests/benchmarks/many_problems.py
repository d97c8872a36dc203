"""The cost of the client alone: problems a second, and memory, for 10,000 and 100,000 problems.

A stand-in server answers every problem from memory with the same trajectory of 128 tokens and top-k 20, so that its own
work is small. With two cores or more the client has one to itself. Prints the rate from the client's start to its end,
peak memory, and the ratio of the two peaks; and how long the import of the library takes.

    .venv/bin/python tests/benchmarks/many_problems.py [--problems 10000 100000]

With another checkout, it runs both clients in turns. Prints CPU time a problem without that of a client's start, peak
memory, and whether both wrote the same samples, byte for byte.

    .venv/bin/python tests/benchmarks/many_problems.py --tree CHECKOUT [--problems 4000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOKENS, TOP_K, PROMPT = 128, 20, 80
START_PROBLEMS = 16
"""The cost of a client for so few problems is the cost of its start."""
IMPORT = "import time; t = time.time(); from client import SamplingClient, read_samples; print(time.time() - t)"


def canned_line() -> tuple[bytes, bytes]:
    """The line that answers every problem: the parts before and after the problem's id."""
    from support.runs.made_run import VOCABULARY

    from client.protocol.requests import Trajectory

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (TOKENS, VOCABULARY))
    expert = (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)
    other = expert + rng.normal(0, 1, expert.shape)
    amateur = (other - np.log(np.exp(other).sum(1, keepdims=True))).astype(np.float32)
    ids = np.argsort(-expert, axis=1)[:, :TOP_K].astype(np.int32)
    values = (np.take_along_axis(array, ids, 1) for array in (expert, amateur))
    prompt = rng.integers(0, VOCABULARY, PROMPT, dtype=np.int32)
    line = Trajectory("THE-ID", 0, prompt, ids[:, 0].copy(), ids, *values, "length").to_line("base64")
    before, after = line.split(b"THE-ID")
    return before, after


def serve(port: int) -> None:
    """Run the stand-in server in this process."""
    import uvicorn
    from support.servers.contract_server import ContractServer

    before, after = canned_line()
    server = ContractServer()
    server.line = lambda problem, index: before + problem["id"].encode() + after
    uvicorn.run(server.app, port=port, log_level="warning")


def wait_for(port: int) -> None:
    """Wait until the stand-in listens."""
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    sys.exit("the stand-in server did not start")


class Cost(NamedTuple):
    """The cost of one client."""

    rate: float  # problems a second
    peak: float  # MiB
    cpu: float  # seconds


def measure(count: int, url: str, run: Path, tree: Path = ROOT) -> Cost:
    """Run the client of a checkout on `count` problems. Returns its cost."""
    problems = run.with_name(f"{count}.jsonl")
    with problems.open("w") as file:
        for index in range(count):
            print(json.dumps({"id": f"p{index}", "question": f"What is {index} plus {index}?"}), file=file)
    words = ["sample", problems, run, "--server", url, "--top-k", TOP_K]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "client", *map(str, words)], cwd=tree, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(tree)},
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("the client failed")
    seconds = time.perf_counter() - began
    return Cost(count / seconds, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)


def samples(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a RUN's samples by their keys; arrays as bytes."""
    import pyarrow.parquet as pq

    rows = (row for part in (run / "samples").glob("part-*") for row in pq.read_table(part).to_pylist())
    return {(row["problem_id"], row["sample_index"]): row for row in rows}


def beside(tree: Path, count: int, rounds: int, url: str, folder: Path) -> None:
    """Print the costs of this checkout's client and of another's, run in turns."""
    costs: dict[Path, list[tuple[float, float]]] = {tree: [], ROOT: []}
    for number in range(rounds):
        for checkout, found in costs.items():
            name = f"{number}-{'other' if checkout == tree else 'this'}"
            start = measure(START_PROBLEMS, url, folder / f"start-{name}", checkout)
            cost = measure(count, url, folder / f"run-{name}", checkout)
            milliseconds = 1e3 * (cost.cpu - start.cpu) / (count - START_PROBLEMS)
            found.append((milliseconds, cost.peak))
            print(f"{checkout}: {milliseconds:.2f} ms of CPU a problem, peak memory {cost.peak:,.0f} MiB", flush=True)
    (before, peak_before), (after, peak) = (
        map(statistics.median, zip(*found, strict=True)) for found in costs.values()
    )
    print(f"medians: {before:.2f} and {after:.2f} ms a problem, ratio {after / before:.2f}")
    print(f"peak memory, ratio: {peak / peak_before:.2f}")
    same = samples(folder / "run-0-other") == samples(folder / "run-0-this")
    print(f"samples of both: {'the same' if same else 'NOT the same'}")


def alone(counts: list[int], url: str, folder: Path) -> None:
    """Print the cost of this checkout's client for several numbers of problems."""
    peaks = []
    for count in counts:
        cost = measure(count, url, folder / f"run-{count}")
        peaks.append(cost.peak)
        print(f"{count:,} problems: {cost.rate:,.0f} problems/s, peak memory {cost.peak:,.0f} MiB", flush=True)
    print(f"peak memory, last : first: {peaks[-1] / peaks[0]:.2f}")


def with_server(work: Callable[[str, Path], None]) -> None:
    """Call `work` with the stand-in's URL and an empty folder."""
    from support.servers.real_server import free_port

    port = free_port()
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        wait_for(port)
        with tempfile.TemporaryDirectory() as folder:
            work(f"http://127.0.0.1:{port}", Path(folder))
    finally:
        server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, nargs="+")
    parser.add_argument("--tree", type=Path, help="another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    if arguments.tree:
        return with_server(lambda url, folder: beside(
            arguments.tree.resolve(), (arguments.problems or [4000])[0], arguments.rounds, url, folder
        ))  # fmt: skip
    imports = [float(subprocess.check_output([sys.executable, "-c", IMPORT], cwd=ROOT)) for _ in range(5)]
    print(f"from client import SamplingClient, read_samples: {statistics.median(imports):.2f} s, median of 5")
    with_server(lambda url, folder: alone(arguments.problems or [10_000, 100_000], url, folder))


if __name__ == "__main__":
    main()

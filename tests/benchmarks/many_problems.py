"""What the client alone costs: problems a second, and memory, for 10,000 and 100,000 problems.

The server stands in from memory: every answer is the same trajectory of 128 tokens and top-k 20 under the problem's
id, so that its own work is small. With two cores or more the client has one to itself. Prints the rate from the first
request to the sealed RUN, peak memory, and the ratio of the two peaks; and how long importing the library takes.

    .venv/bin/python tests/benchmarks/many_problems.py [--problems 10000 100000]
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
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
TOKENS, TOP_K, PROMPT = 128, 20, 80
IMPORT = "import time; t = time.time(); from client import SamplingClient, read_samples; print(time.time() - t)"


def canned_line() -> tuple[bytes, bytes]:
    """What stands before and after the problem's id."""
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
    """The stand-in, in a process of its own."""
    import uvicorn
    from support.servers.contract_server import ContractServer

    before, after = canned_line()
    server = ContractServer()
    server.line = lambda problem, index: before + problem["id"].encode() + after
    uvicorn.run(server.app, port=port, log_level="warning")


def wait_for(port: int) -> None:
    """Until the stand-in listens."""
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.2)
    sys.exit("the stand-in server did not start")


def measure(count: int, url: str, folder: Path) -> tuple[float, float]:
    """Problems a second, and the client's peak memory in MiB."""
    problems = folder / f"{count}.jsonl"
    with problems.open("w") as file:
        for index in range(count):
            print(json.dumps({"id": f"p{index}", "question": f"What is {index} plus {index}?"}), file=file)
    words = ["sample", problems, folder / f"run-{count}", "--server", url, "--top-k", TOP_K]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "client", *map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, {max(os.sched_getaffinity(0))}),
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("the client failed")
    return count / (time.perf_counter() - began), usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve(arguments.serve)
    from support.servers.real_server import free_port

    imports = [float(subprocess.check_output([sys.executable, "-c", IMPORT], cwd=ROOT)) for _ in range(5)]
    print(f"from client import SamplingClient, read_samples: {statistics.median(imports):.2f} s, median of 5")
    port = free_port()
    server = subprocess.Popen([sys.executable, __file__, "--serve", str(port)])
    try:
        wait_for(port)
        with tempfile.TemporaryDirectory() as folder:
            peaks = []
            for count in arguments.problems:
                rate, peak = measure(count, f"http://127.0.0.1:{port}", Path(folder))
                peaks.append(peak)
                print(f"{count:,} problems: {rate:,.0f} problems/s, peak memory {peak:,.0f} MiB", flush=True)
            print(f"peak memory, last : first: {peaks[-1] / peaks[0]:.2f}")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()

"""The cost of the service against vLLM alone, and of a job for requests beside it. SmolLM2 pair, float32.

Prints, from one run: problems/s through the service against the expert alone in vLLM's `LLM` on the same core, with
the same dtype, top-k and max_num_seqs (warm, in turns, median of 5); the latency of single requests while a job of
1,000 problems runs and while none does; the event loop's lag. The machine should be otherwise idle; the expert has
one core, the amateur and everything else the other.

    .venv/bin/python tests/benchmarks/service.py PROBLEMS.jsonl [--max-tokens 32] [--rounds 5]
    .venv/bin/python tests/benchmarks/service.py PROBLEMS.jsonl --tree CHECKOUT    (this checkout beside another)

With another checkout, it prints the CPU time per problem of a server and its engines, of both checkouts in turns. Other
processes on the machine do not matter then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import httpx
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "deploy" / "demo")]
PROBLEMS, SEQUENCES, TOP_K, CONTEXT = 256, 64, 20, 1024
JOB_PROBLEMS, SINGLE_REQUESTS = 1000, 30
SYSTEM = "Please reason step by step."

ALONE = """
import json, sys, time
from vllm import LLM, SamplingParams
model, problems, limit, max_tokens, top_k, sequences, context = sys.argv[1:]
from client.problems.reader import read_problems
llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=int(context), kv_cache_memory_bytes=2**31,
          max_num_seqs=int(sequences), generation_config="vllm", disable_log_stats=True, enable_chunked_prefill=False)
system = {"role": "system", "content": "Please reason step by step."}
chats = [[system, {"role": "user", "content": row.question}] for row in read_problems(problems, int(limit))]
params = SamplingParams(temperature=0, max_tokens=int(max_tokens), logprobs=int(top_k), detokenize=False)
for line in sys.stdin:
    llm.reset_prefix_cache()
    began = time.perf_counter()
    llm.chat(chats, params, use_tqdm=False)
    print("\\nseconds", time.perf_counter() - began, flush=True)
"""


class Alone:
    """The expert in vLLM's `LLM`, in a process of its own on the expert's core, asked once a round."""

    def __init__(self, expert: Path, problems: str, max_tokens: int) -> None:
        arguments = map(str, (expert, problems, PROBLEMS, max_tokens, TOP_K, SEQUENCES, CONTEXT))
        environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", ALONE, *arguments], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def round(self) -> float:
        assert self._process.stdin and self._process.stdout
        print(file=self._process.stdin, flush=True)
        line = next(line for line in self._process.stdout if line.startswith("seconds"))
        return float(line.split()[1])

    def stop(self) -> None:
        self._process.communicate("")


def service_round(url: str, rows: list[dict[str, str]], max_tokens: int, salt: int) -> float:
    """Seconds for all problems in one request. A new `salt` keeps the prefix cache from helping a later round."""
    problems = [{"id": row["id"], "question": row["question"]} for row in rows]
    body = {"problems": problems, "max_tokens": max_tokens, "top_k": TOP_K, "encoding": "base64"}
    body["system_prompt"] = f"{SYSTEM}{' ' * salt}"
    began = time.perf_counter()
    answer = httpx.post(f"{url}/v1/trajectories", json=body, timeout=None)
    seconds = time.perf_counter() - began
    assert answer.text.count('"finish_reason"') == len(rows), answer.text[:500]
    return seconds


def single_latencies(url: str, rows: list[dict[str, str]], max_tokens: int, job: str | None = None) -> np.ndarray:
    """Seconds of single requests, one after the other; while a job runs, if one is named."""
    found = []
    for row in rows[:SINGLE_REQUESTS]:
        if job and httpx.get(f"{url}/v1/jobs/{job}").json()["completed_at"]:
            break
        body = {"problems": [{"id": "1", "question": row["question"]}], "max_tokens": max_tokens, "top_k": TOP_K}
        began = time.perf_counter()
        assert httpx.post(f"{url}/v1/trajectories", json=body, timeout=None).status_code == 200
        found.append(time.perf_counter() - began)
    return np.array(found)


def beside(tree: Path, rows: list[dict[str, str]], max_tokens: int, rounds: int) -> None:
    """Print the CPU time of two checkouts' servers, which run at the same time and work in turns."""
    from gpu.card import cpu_seconds
    from smollm2 import make_pair
    from support.servers.real_server import SMOLLM2, processes_of, running_server

    pair, engine = make_pair(SMOLLM2), {"max_num_seqs": SEQUENCES}
    spent: dict[Path, list[float]] = {tree: [], ROOT: []}
    with contextlib.ExitStack() as servers:
        running = {}
        for checkout in spent:
            folder = Path(servers.enter_context(tempfile.TemporaryDirectory()))
            path = os.pathsep.join(str(checkout / name) for name in ("", "tests", "deploy/demo"))
            running[checkout] = servers.enter_context(
                running_server(
                    *pair, folder, max_model_len=CONTEXT, expert_arguments=engine,
                    environment={"PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                )
            )  # fmt: skip
        for number in range(rounds + 1):
            for checkout, server in running.items():
                before = sum(map(cpu_seconds, processes_of(server.process.pid)))
                service_round(server.url, rows, max_tokens, number)
                spent[checkout].append(sum(map(cpu_seconds, processes_of(server.process.pid))) - before)
    other, this = (1e3 * median(values[1:]) / len(rows) for values in spent.values())  # the first one warms up
    print(f"{len(rows)} problems x {max_tokens} tokens, median of {rounds} rounds in turns, CPU ms a problem")
    print(f"{tree}: {other:.0f}, this checkout: {this:.0f}, ratio {this / other:.2f}")


def lag_quantile(url: str, share: float) -> float:
    """An upper bound of a quantile of the event loop's lag, in seconds: the end of the histogram's bucket."""
    buckets = []
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("lightreasoner_event_loop_lag_seconds_bucket"):
            buckets.append((float(line.split('"')[1]), float(line.split()[-1])))
    return next(bound for bound, count in buckets if count >= share * buckets[-1][1])


def main() -> None:
    from smollm2 import make_pair
    from support.servers.real_server import SMOLLM2, running_server

    from client.problems.reader import read_problems

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tree", type=Path, help="another checkout, to compare with")
    asked = parser.parse_args()
    if asked.tree:
        rows = [{"id": row.id, "question": row.question} for row in read_problems(asked.problems, SEQUENCES)]
        beside(asked.tree.resolve(), rows, asked.max_tokens, asked.rounds)
        return
    expert, amateur = make_pair(SMOLLM2)
    rows = [{"id": row.id, "question": row.question} for row in read_problems(asked.problems, JOB_PROBLEMS)]
    with tempfile.TemporaryDirectory() as folder:
        bucket = Path(folder, "bucket")
        engine = {"max_num_seqs": SEQUENCES}
        with running_server(
            expert,
            amateur,
            Path(folder),
            max_model_len=CONTEXT,
            cache_bytes=2**31,
            expert_arguments=engine,
            bucket=str(bucket),
        ) as server:
            alone = Alone(expert, asked.problems, asked.max_tokens)
            seconds: dict[str, list[float]] = {"alone": [], "service": []}
            alone.round(), service_round(server.url, rows[:SEQUENCES], asked.max_tokens, 0)
            for number in range(asked.rounds):
                seconds["alone"].append(alone.round())
                seconds["service"].append(service_round(server.url, rows[:PROBLEMS], asked.max_tokens, number + 1))
                print({name: [round(value, 1) for value in values] for name, values in seconds.items()}, flush=True)
            alone.stop()
            lag = lag_quantile(server.url, 0.5), lag_quantile(server.url, 0.99)
            idle = single_latencies(server.url, rows, asked.max_tokens)
            job = {"problems": rows, "run": "job", "max_tokens": asked.max_tokens, "top_k": TOP_K}
            made = httpx.post(f"{server.url}/v1/jobs", json=job).raise_for_status().json()
            while server.metric("vllm:num_requests_running", role="expert") < SEQUENCES / 2:
                time.sleep(0.2)
            busy = single_latencies(server.url, rows, asked.max_tokens, made["id"])
            httpx.post(f"{server.url}/v1/jobs/{made['id']}/cancel")  # 409 if it has ended by now
    rate = {name: PROBLEMS / median(values) for name, values in seconds.items()}
    print(f"\n{PROBLEMS} problems x {asked.max_tokens} tokens, median of {asked.rounds} rounds in turns")
    print(f"expert alone      {rate['alone']:.2f} problems/s")
    print(f"service           {rate['service']:.2f} problems/s")
    print(f"service : alone   {rate['service'] / rate['alone']:.2f}")
    print(f"event loop lag, {PROBLEMS} in flight: p50 <= {lag[0] * 1e3:g} ms, p99 <= {lag[1] * 1e3:g} ms")
    for name, found in (("no job", idle), ("beside a job of 1,000", busy)):
        quantiles = np.quantile(found, [0.5, 0.99])
        print(f"a single request, {name}: p50 {quantiles[0]:.2f} s, p99 {quantiles[1]:.2f} s, {len(found)} asked")
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()

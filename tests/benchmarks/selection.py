"""What each top k finds, and its cost: selected steps against the full-vocabulary divergence, SmolLM2 pair.

For each k it prints: precision and recall of the certified selection (bound > beta, set complete) against KL > beta
computed by transformers over the whole vocabulary; the steps that an estimate would add, how many of them are wrong,
and its recall; bytes a trajectory on the wire and in a RUN; seconds a problem through the service. The estimate adds to
the bound what the tail would hide if it were as uneven as the top k.

    .venv/bin/python tests/benchmarks/selection.py PROBLEMS.jsonl [--problems 48] [--beta 0.4] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "deploy" / "demo")]
MAX_TOKENS, CONTEXT, ALPHA, FIRST_STEP = 128, 1024, 0.2, 1
KS = 5, 10, 20, 64, 128


def hidden_by_the_tail(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """p_r, the mass of the tail, times the divergence of the k ids among themselves: [T, k] x 2 -> [T]."""
    p, q = np.exp(log_p.astype(float)), np.exp(log_q.astype(float))
    total = p.sum(1)
    among = (p * (log_p - log_q)).sum(1) / total - np.log(total / q.sum(1))
    return np.maximum(1 - total, 0) * np.maximum(among, 0)


async def asked(url: str, problems: str, count: int, k: int) -> tuple[list, float]:
    """The trajectories at one k, sorted by problem, and seconds a problem."""
    from client import SamplingClient, SamplingSettings, read_problems

    rows = [row.problem for row in read_problems(problems, count)]
    async with SamplingClient(url) as client:
        await client.models()
        began = time.perf_counter()
        lines = [line async for line in client.trajectories(rows, SamplingSettings(max_tokens=MAX_TOKENS, top_k=k))]
        seconds = time.perf_counter() - began
    return sorted(lines, key=lambda line: line.problem_id), seconds / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem_set", metavar="PROBLEMS.jsonl")
    parser.add_argument("--problems", type=int, default=48)
    parser.add_argument("--beta", type=float, default=0.4)
    parser.add_argument("--dtype", default="float32", help="of the service; the whole vocabulary is always float32")
    arguments = parser.parse_args()
    from smollm2 import make_pair
    from support.models.oracle import Oracle
    from support.runs.made_run import make_manifest
    from support.servers.real_server import running_server

    from client.contrast import kl_lower_bound, mask_complete
    from client.runs.run import Run

    pair = make_pair(ROOT / ".cache" / "smollm2")
    models, exact = list(map(Oracle, pair)), {}
    with tempfile.TemporaryDirectory() as folder:
        with running_server(*pair, Path(folder), arguments.dtype, CONTEXT, cache_bytes=2**31) as server:
            asyncio.run(asked(server.url, arguments.problem_set, 4, 20))  # warm
            found = {k: asyncio.run(asked(server.url, arguments.problem_set, arguments.problems, k)) for k in KS}
        print("         bound > beta      the estimate adds        bytes a trajectory     seconds")
        print("   k  precision  recall    steps  wrong  recall       sent    in a RUN   a problem")
        for k, (lines, seconds) in found.items():
            truth, kept, estimated, wire = [], [], [], 0
            for line in lines:
                key = line.problem_id, line.token_ids.tobytes()
                if key not in exact:
                    expert, amateur = (model.logprobs(line.prompt_token_ids, line.token_ids) for model in models)
                    exact[key] = (np.exp(expert) * (expert - amateur)).sum(1)
                log_p, log_q = line.expert_logprobs, line.amateur_logprobs
                complete = mask_complete(log_p, log_q, ALPHA, vocab_size=49152)[FIRST_STEP:]
                bound = kl_lower_bound(log_p, log_q)
                truth.append(exact[key][FIRST_STEP:] > arguments.beta)
                kept.append(complete & (bound[FIRST_STEP:] > arguments.beta))
                guess = bound + hidden_by_the_tail(log_p, log_q)
                estimated.append(complete & (guess[FIRST_STEP:] > arguments.beta))
                wire += len(line.to_line("base64"))
            run = Run(f"{folder}/run-{k}")
            run.write(lines, {}, make_manifest(top_k=k))
            stored = sum(file.stat().st_size for file in Path(f"{folder}/run-{k}/trajectories").iterdir())
            right = np.concatenate(truth)
            bound, guess = np.concatenate(kept), np.concatenate(estimated)
            added = guess & ~bound
            print(
                f"{k:4}{(bound & right).sum() / max(bound.sum(), 1):11.4f}{(bound & right).sum() / right.sum():8.3f}"
                f"{added.sum():9}{(added & ~right).sum():7}{(guess & right).sum() / right.sum():8.3f}"
                f"{wire / len(lines):11,.0f}{stored / len(lines):12,.0f}{seconds:12.2f}"
            )
        print(f"{len(right)} steps, {right.sum()} of them above {arguments.beta:g} nats")


if __name__ == "__main__":
    main()

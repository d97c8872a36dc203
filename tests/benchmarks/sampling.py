"""Sampling speed and agreement on a real vocabulary: SmolLM2-135M and its weaker sibling.

For float32 and bfloat16, it prints the service's summary on a problem set, its agreement with transformers in float32
on the same ids (of the first 16 trajectories), and its time against that of vLLM's generation with the expert alone.
Both times are of one run; the machine should be otherwise idle.

    .venv/bin/python tests/benchmarks/sampling.py PROBLEMS.jsonl [LIMIT]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "deploy" / "demo")]
MAX_TOKENS, TOP_K, CONTEXT = 128, 20, 1024
COMPARED = 16
"""Trajectories that transformers recomputes."""

GENERATE = """
import json, sys, time
from vllm import LLM, SamplingParams
from client.problems.reader import read_problems
model, dtype, problems, limit, max_tokens, context, top_k = sys.argv[1:]
llm = LLM(model, dtype=dtype, enforce_eager=True, max_model_len=int(context), kv_cache_memory_bytes=2**31,
          generation_config="vllm", disable_log_stats=True)
system = {"role": "system", "content": "Please reason step by step."}
chats = [[system, {"role": "user", "content": row.question}] for row in read_problems(problems, int(limit))]
params = SamplingParams(temperature=0, max_tokens=int(max_tokens), logprobs=int(top_k), detokenize=False)
llm.chat(chats[:4], params, use_tqdm=False)
began = time.perf_counter()
outputs = llm.chat(chats, params, use_tqdm=False)
seconds = time.perf_counter() - began
print("\\n" + json.dumps({"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in outputs)}))
"""


def measure(dtype: str, pair: tuple[Path, Path], problems: str, limit: int) -> dict[str, float]:
    """Run the service, then vLLM with the expert alone. Prints the summary and returns the figures."""
    from support.models.oracle import Oracle
    from support.servers.real_server import running_server

    from client.runs.run import Run

    with tempfile.TemporaryDirectory() as folder:
        with running_server(*pair, Path(folder), dtype=dtype, max_model_len=CONTEXT, cache_bytes=2**31) as server:
            words = ["-m", "client", "sample", problems, f"{folder}/run", "--server", server.url, "--limit", limit]
            words += ["--max-tokens", MAX_TOKENS, "--top-k", TOP_K]
            began = time.perf_counter()
            subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT)
            service_seconds = time.perf_counter() - began
        lines = list(Run(f"{folder}/run").trajectories())
    arguments = [str(pair[0]), dtype, problems, limit, MAX_TOKENS, CONTEXT, TOP_K]
    said = subprocess.run(
        [sys.executable, "-c", GENERATE, *map(str, arguments)], check=True, cwd=ROOT, capture_output=True, text=True
    )
    alone = json.loads(next(line for line in said.stdout.splitlines() if line.startswith('{"seconds"')))
    expert, amateur = map(Oracle, pair)
    differences: dict[str, list[np.ndarray]] = {"expert": [], "amateur": []}
    for line in lines[:COMPARED]:
        for name, model in (("expert", expert), ("amateur", amateur)):
            exact = model.logprobs(line.prompt_token_ids, line.token_ids)
            mine = getattr(line, f"{name}_logprobs")
            differences[name].append(np.abs(mine - np.take_along_axis(exact, line.top_ids.astype(int), 1)).ravel())
    figures = {
        "service, s a problem": service_seconds / len(lines),
        "service, tokens/s": sum(len(line.token_ids) for line in lines) / service_seconds,
        "expert alone, s a problem": alone["seconds"] / len(lines),
        "expert alone, tokens/s": alone["tokens"] / alone["seconds"],
        "time, service : expert alone": service_seconds / alone["seconds"],
    }
    for name, parts in differences.items():
        every = np.concatenate(parts)
        figures[f"{name} |difference|, mean"] = float(every.mean())
        figures[f"{name} |difference|, 99.9th percentile"] = float(np.quantile(every, 0.999))
    return figures


def main() -> None:
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    from smollm2 import make_pair

    pair = make_pair(ROOT / ".cache" / "smollm2")
    limit = int(sys.argv[2]) if len(sys.argv) == 3 else 64
    figures = {dtype: measure(dtype, pair, sys.argv[1], limit) for dtype in ("float32", "bfloat16")}
    print(f"\n{'':44}{'float32':>12}{'bfloat16':>12}")
    for name in figures["float32"]:
        print(f"{name:44}" + "".join(f"{figures[dtype][name]:12.2g}" for dtype in figures))


if __name__ == "__main__":
    main()

"""The service against the published recipe, in seconds a problem. SmolLM2 pair, float32, all cores.

The published recipe is rewritten here: transformers generates one problem at a time with the expert. Then the amateur
reads every prefix of the answer from its beginning, 64 prefixes a batch, for the distribution at the prefix's end. Both
times are of one run; the machine should be otherwise idle.

    .venv/bin/python tests/benchmarks/published.py PROBLEMS.jsonl [--problems 64] [--recipe-problems 2]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "deploy" / "demo")]
MAX_TOKENS, PREFIXES, TOP_K, CONTEXT = 128, 64, 20, 1024


@torch.inference_mode()
def recipe(pair: tuple[Path, Path], questions: list[str]) -> float:
    """Seconds a problem. The first problem warms up and is not counted."""
    expert, amateur = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in pair)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    pad, began = tokenizer.pad_token_id or 0, 0.0
    for index, question in enumerate(questions):
        if index == 1:
            began = time.perf_counter()
        chat = [{"role": "system", "content": "Please reason step by step."}, {"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = expert.generate(
            **prompt, max_new_tokens=MAX_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        ids, length = made.sequences[0], prompt["input_ids"].shape[1]
        prefixes = [ids[:end] for end in range(length, len(ids))]
        for first in range(0, len(prefixes), PREFIXES):
            some = prefixes[first : first + PREFIXES]
            batch = torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=pad, padding_side="left")
            mask = torch.nn.utils.rnn.pad_sequence(
                [torch.ones_like(prefix) for prefix in some], batch_first=True, padding_side="left"
            )
            amateur(input_ids=batch, attention_mask=mask).logits[:, -1].log_softmax(-1)
    return (time.perf_counter() - began) / (len(questions) - 1)


def service(pair: tuple[Path, Path], problems: str, count: int) -> float:
    """Seconds a problem, with the client's start, without the server's."""
    from support.servers.real_server import running_server

    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(*pair, Path(folder), max_model_len=CONTEXT, cache_bytes=2**31) as server,
    ):
        words = ["sample", problems, f"{folder}/run", "--server", server.url, "--limit", count]
        words += ["--max-tokens", MAX_TOKENS, "--top-k", TOP_K]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "client", *map(str, words)], check=True, cwd=ROOT)
        return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problem_set", metavar="PROBLEMS.jsonl")
    parser.add_argument("--problems", type=int, default=64, help="problems for the service")
    parser.add_argument("--recipe-problems", type=int, default=2, help="problems for the recipe")
    arguments = parser.parse_args()
    from smollm2 import make_pair

    from client.problems.reader import read_problems

    pair = make_pair(ROOT / ".cache" / "smollm2")
    mine = service(pair, arguments.problem_set, arguments.problems)
    rows = read_problems(arguments.problem_set, arguments.recipe_problems + 1)
    theirs = recipe(pair, [row.question for row in rows])
    print(f"the service: {mine:.2f} s a problem; the published recipe: {theirs:.1f}; ratio {theirs / mine:.1f}")


if __name__ == "__main__":
    main()

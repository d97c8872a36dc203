"""Checks vLLM's scoring code, called as by its V2 model runner, at the width of a real vocabulary. Needs `V2_ON_CPU`.

The logits are 151,936 columns of rows that hold 152,064, as with a padded head; columns beyond must not be read. Prints
as JSON the largest difference from a log-softmax in float64, for each dtype and k: of given ids (two requests whose
prompts come in chunks, with -1 in columns and rows), and of the best k ids with the ranks of sampled tokens.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401  # as vLLM's CPU worker does, before all else
import vllm.v1.worker.gpu.sample.prompt_logprob as prompt_logprob
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores

COLUMNS, PADDED = 151_936, 152_064
MANY = prompt_logprob.CHUNK_SIZE
SOME = ((torch.float32, 128, MANY), (torch.bfloat16, 20, 2))
EVERY = (*((dtype, k, MANY) for dtype in (torch.float32, torch.bfloat16) for k in (20, 128)), (torch.float32, 20, 2))
"""`SOME`, at every change: each dtype, k and number of rows once. `EVERY`, in `make test-long`: dtypes with each k."""
PROMPTS, START, CHUNK = (7, 5), 1, 3
"""Tokens of each request's prompt, its first scored row, and the tokens of it that a step computes."""


def head(dtype: torch.dtype, rows: int, seed: int) -> torch.Tensor:
    """Logits [rows, COLUMNS]: a view of wider rows, which hold NaN beyond `COLUMNS`."""
    wide = torch.full((rows, PADDED), torch.nan, dtype=dtype)
    wide[:, :COLUMNS] = torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed)) * 4
    return wide[:, :COLUMNS]


def given_ids(dtype: torch.dtype, k: int) -> float:
    """The largest difference of the scores of given ids from exact ones."""
    rng = np.random.default_rng(k)
    worker = prompt_logprob.PromptLogprobsWorker(len(PROMPTS), torch.device("cpu"))
    logits = [head(dtype, length, seed) for seed, length in enumerate(PROMPTS)]
    asked = []
    for index, length in enumerate(PROMPTS):
        ids = rng.integers(0, COLUMNS, (length - 1 - START, k)).astype(np.int32)
        ids[0, :2], ids[0, 2] = -1, COLUMNS - 1
        ids[1] = -1
        asked.append(ids)
        params = SamplingParams(prompt_logprob_token_ids=ids, prompt_logprob_start=START)
        worker.add_request(str(index), index, params)
    found: dict[str, torch.Tensor] = {}
    for begin in range(0, max(PROMPTS), CHUNK):
        running = [index for index, length in enumerate(PROMPTS) if begin < length]
        scheduled = [min(CHUNK, PROMPTS[index] - begin) for index in running]
        batch = SimpleNamespace(
            req_ids=[str(index) for index in running], idx_mapping_np=np.array(running),
            num_computed_prefill_tokens_np=np.full(len(running), begin), num_scheduled_tokens=np.array(scheduled),
            prefill_len_np=np.array([PROMPTS[index] for index in running]),
            query_start_loc_np=np.cumsum([0, *scheduled]),
        )  # fmt: skip
        rows = torch.cat(
            [logits[index][begin : begin + count] for index, count in zip(running, scheduled, strict=True)]
        )
        wide = torch.full((len(rows), PADDED), torch.nan, dtype=dtype)
        wide[:, :COLUMNS] = rows
        step = worker.compute_prompt_token_id_logprobs(
            lambda hidden, wide=wide: wide[hidden[:, 0].long(), :COLUMNS],
            torch.arange(len(rows))[:, None], batch, np.array(PROMPTS),
        )  # fmt: skip
        assert not found.keys() & step.keys()
        found |= step
    worst = 0.0
    for index, ids in enumerate(asked):
        exact = logits[index][START:-1].double().log_softmax(1)
        exact = exact.gather(1, torch.from_numpy(ids).long().clamp_min(0)).masked_fill(
            torch.from_numpy(ids) < 0, -torch.inf
        )
        mine = found[str(index)].double()
        assert torch.equal(mine.isinf(), exact.isinf()) and int(mine.isinf().sum()) == k + 2
        worst = max(worst, float((mine - exact).nan_to_num().abs().max()))
    return worst


def best_ids(dtype: torch.dtype, k: int) -> float:
    """Check the best k ids and the sampled tokens' ranks. Returns the largest difference of a score from exact ones."""
    logits = head(dtype, 4, k)
    sampled = torch.tensor([COLUMNS - 1, 0, 77, int(logits[3].argmax())])
    scores = compute_topk_scores(logits, k, sampled)
    exact = logits.double().log_softmax(1)
    assert torch.equal(scores.logprob_token_ids[:, 0], sampled)
    assert torch.equal(logits.gather(1, scores.logprob_token_ids[:, 1:]), logits.topk(k).values)
    own = logits.gather(1, sampled[:, None])
    if dtype == torch.float32:  # the interpreter compares bfloat16 by its bits; our code never asks for ranks
        assert torch.equal(scores.selected_token_ranks, (logits >= own).sum(1))
    return float((scores.logprobs.double() - exact.gather(1, scores.logprob_token_ids)).abs().max())


def measured(ways: Iterable[tuple[torch.dtype, int, int]]) -> dict[str, float]:
    """The largest difference of each kernel, for each dtype, k and number of rows whose logits exist at a time."""
    worst = {}
    for dtype, k, rows in ways:
        prompt_logprob.CHUNK_SIZE = rows
        worst[f"given ids, {dtype}, k = {k}, {rows} rows at a time"] = given_ids(dtype, k)
        worst[f"best ids, {dtype}, k = {k}"] = best_ids(dtype, k)
    return worst


def main() -> None:
    """Print the figures as JSON."""
    print(json.dumps(measured(EVERY if sys.argv[1:] == ["all"] else SOME)))


if __name__ == "__main__":
    main()

"""Scores the expert's ids by the amateur: which rows of which prompt, and how to request them from vLLM.

In: a trajectory's tokens and the expert's top-k ids. Out: prompts and sampling parameters for the amateur's engine, and
the step of each row. Never runs an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ScoringPass:
    """One prompt for the amateur. Row i of its scores belongs to step `steps[i]`, unless that is -1."""

    prompt_token_ids: list[int]
    start: int  # prompt_token_ids[start + i + 1] is what row i predicts
    token_ids: Ints  # [rows, k], -1 pads
    steps: Ints  # [rows]


def scoring_passes(
    prompt: Ints, completion: Ints, top_ids: Ints, known: npt.NDArray[np.bool_], own: Ints | None = None
) -> Iterator[ScoringPass]:
    """Yield the passes that score a trajectory: one, or more if the amateur does not know a token in it.

    Args:
        prompt: [P], as the expert reads it; completion: [T]; top_ids: [T, k].
        known: [expert's vocabulary], the ids that may be sent to the amateur.
        own: the amateur's own prompt, which it reads in place of `prompt`.

    Tokens that the amateur does not know are left out of its prompt. The step after such a token is then predicted from
    the same row as the step before it, and goes into a further pass. No step is predicted from a prompt's last token:
    it only makes the row before it a prompt row, so any known id will do. Raises ValueError if the amateur knows no
    token of the prompt.
    """
    before = prompt[known[prompt]] if own is None else own
    if not len(before):
        raise ValueError(
            "the amateur knows no token of the prompt; choose a chat template made of shared tokens, or"
            " amateur_prompt 'own'"
        )
    readable = known[completion[:-1]]
    row_of_step = len(before) - 1 + np.concatenate(([0], np.cumsum(readable)))  # [T]: the row that predicts each step
    seen = np.concatenate((before, completion[:-1][readable])).tolist()
    start = int(row_of_step[0])
    asked = np.where(known[top_ids], top_ids, -1).astype(np.int32)
    _, first_step_of_row = np.unique(row_of_step, return_index=True)
    pass_of_step = np.arange(len(completion)) - first_step_of_row[row_of_step - start]
    for number in range(int(pass_of_step.max()) + 1):
        mine = np.flatnonzero(pass_of_step == number)
        token_ids = np.full((len(seen) - start, top_ids.shape[1]), -1, np.int32)
        steps = np.full(len(seen) - start, -1, np.int32)
        token_ids[row_of_step[mine] - start] = asked[mine]
        steps[row_of_step[mine] - start] = mine
        yield ScoringPass([*seen, seen[-1]], start, token_ids, steps)


def scoring_params(scoring: ScoringPass, native: bool) -> SamplingParams:
    """Sampling parameters that make the amateur's engine score a pass.

    `native`: through vLLM's own `prompt_logprob_token_ids` (V2 model runner), else through `server.engines.worker`.
    """
    params = SamplingParams(
        max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, ignore_eos=True
    )
    if native:
        params.prompt_logprob_token_ids = scoring.token_ids
        params.prompt_logprob_start = scoring.start
        params.skip_reading_prefix_cache = True
    else:
        params.extra_args = {
            "score_start": scoring.start,
            "score_shape": list(scoring.token_ids.shape),
            "score_ids": scoring.token_ids.astype("<i4").tobytes(),
        }
    return params

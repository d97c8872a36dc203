"""A vLLM worker for the CPU build that scores requested ids as predictions of prompt tokens.

vLLM's V2 model runner does this itself (`prompt_logprob_token_ids`) but needs Triton, so usually a GPU; the V1 runner
of the CPU build does not do it. In: `SamplingParams.extra_args` made by `server.engines.scoring`. Out: float32 [rows,
k] in `ModelRunnerOutput.prompt_token_id_logprobs_dict`, which vLLM carries to `RequestOutput.prompt_token_id_logprobs`.
The data moved between processes never grow with the vocabulary.

Runs inside the amateur's engine process, through the engine argument `worker_cls`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

ROWS_AT_ONCE = 256
"""Rows whose logits exist at a time: bounds memory at 256 x vocabulary floats."""


@dataclass
class Scores:
    """The scores of one request, filled chunk by chunk as its prompt is computed.

    Row i scores its ids as predictions of prompt token start + i + 1; the last prompt token predicts nothing.
    """

    start: int
    ids: torch.Tensor  # [rows, k], int64, -1 pads
    logprobs: torch.Tensor  # [rows, k], float32

    @classmethod
    def asked_by(cls, extra_args: dict[str, Any]) -> Scores:
        shape = tuple(extra_args["score_shape"])
        ids = torch.frombuffer(bytearray(extra_args["score_ids"]), dtype=torch.int32).reshape(shape).long()
        return cls(extra_args["score_start"], ids, torch.full(shape, -torch.inf))


class ScoringModelRunner(CPUModelRunner):
    """vLLM's V1 CPU model runner, which also gathers requested ids from the log-softmax of scored rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scores: dict[str, Scores] = {}
        self._finished: dict[str, torch.Tensor] = {}

    def _get_prompt_logprobs_dict(self, hidden_states: torch.Tensor, num_scheduled_tokens: dict[str, int]) -> Any:
        self._scores = {name: scores for name, scores in self._scores.items() if name in self.requests}
        for name, scheduled in num_scheduled_tokens.items():
            self._score(name, scheduled, hidden_states)
        return super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:  # type: ignore[override]
        output = super().sample_tokens(grammar_output)
        if self._finished:
            assert isinstance(output, ModelRunnerOutput) and not isinstance(output, AsyncModelRunnerOutput)
            output.prompt_token_id_logprobs_dict, self._finished = self._finished, {}
        return output

    def _score(self, name: str, scheduled: int, hidden_states: torch.Tensor) -> None:
        """Score the rows of request `name` that this step computed. Hand them over when the prompt is done."""
        request = self.requests[name]
        extra_args = request.sampling_params and request.sampling_params.extra_args
        if not extra_args or "score_ids" not in extra_args or request.prompt_token_ids is None:
            return
        begin, prompt_length = request.num_computed_tokens, len(request.prompt_token_ids)
        end = min(begin + scheduled, prompt_length - 1)
        if begin == 0:  # new, or starting over after preemption
            self._scores[name] = Scores.asked_by(extra_args)
        scores = self._scores.get(name)
        if scores is None:  # handed over already, or its first rows were never seen
            return
        offset = int(self.query_start_loc.np[self.input_batch.req_id_to_index[name]]) - begin
        for low in range(max(begin, scores.start), end, ROWS_AT_ONCE):
            high = min(low + ROWS_AT_ONCE, end)
            logits = self.model.compute_logits(hidden_states[offset + low : offset + high])  # type: ignore[operator]
            rows = slice(low - scores.start, high - scores.start)
            ids = scores.ids[rows]
            logprobs = logits.float().log_softmax(dim=1).gather(1, ids.clamp_min(0))
            scores.logprobs[rows] = logprobs.masked_fill(ids < 0, -torch.inf)
        if begin + scheduled >= prompt_length:
            self._finished[name] = self._scores.pop(name).logprobs


class ScoringWorker(CPUWorker):
    """vLLM's V1 CPU worker around `ScoringModelRunner`."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = ScoringModelRunner(self.vllm_config, torch.device("cpu"))

"""The expert-amateur pair over two vLLM engines: a problem goes in, a trajectory scored by both comes out.

Each engine runs in processes of its own. The amateur scores a trajectory as soon as the expert has finished
it, while the expert goes on with others, so the two overlap. Nothing here knows of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from vllm import SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from client.protocol.requests import DEFAULT_TOP_K, FinishReason, ModelCard, Problem, SamplingSettings, Trajectory
from server import metrics
from server.engines.engine import Engine, EngineStartError
from server.engines.preflight import PairFacts
from server.engines.prompts import Accepted, Prompts, TrajectoryError
from server.engines.scoring import scoring_params, scoring_passes
from server.settings import Role

WARM_UP_PROMPT, WARM_UP_TOKENS = 24, 8
INTERACTIVE, JOB = 0, 1
"""Priorities: a request goes ahead of job work wherever it must wait."""


@dataclass(frozen=True)
class Turn:
    """How the problems of one request, or of one job, take turns at the pair."""

    priority: int = INTERACTIVE
    rendering: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Only one of its prompts is rendered at a time, so that others need not wait for all of them."""
    slot: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext
    """A context that is held while the expert's engine works on one of its problems."""


class Pair:
    """Two running engines, which produce trajectories together."""

    def __init__(self, expert: Engine, amateur: Engine, facts: PairFacts, native: bool) -> None:
        self.expert, self.amateur, self.facts = expert, amateur, facts
        self.prompts = Prompts(
            facts,
            {"expert": expert.max_model_len, "amateur": amateur.max_model_len},
            expert.llm.model_config.try_get_generation_config(),
        )
        self.accepted = Accepted(self.max_top_k, expert.max_model_len, facts.expert.vocab_size, self.prompts.has_own)
        self._native = native  # whether vLLM itself scores the expert's ids, or our worker does
        self._started_at = int(time.time())

    @property
    def max_top_k(self) -> int:
        """The largest top_k that both engines support, at most the columns of the expert's head."""
        return min(self.expert.max_logprobs, self.amateur.max_logprobs, self.expert.facts.vocab_size)

    def dead(self) -> dict[Role, str]:
        """The engines that have died, each with vLLM's reason."""
        return {engine.role: reason for engine in (self.expert, self.amateur) if (reason := engine.death) is not None}

    def failure(self) -> str | None:
        """Why the pair no longer works; None while it does."""
        said = [f"the {role}'s engine died: {reason}" for role, reason in self.dead().items()]
        return "; ".join(said) or None

    async def watch(self, seconds: float) -> None:
        """Kill an engine that hangs for `seconds`. Runs until it is cancelled, or both are dead."""
        await asyncio.gather(self.expert.watch(seconds), self.amateur.watch(seconds))

    async def warm_up(self) -> None:
        """Run a few trajectories through both engines, so that first-use compilation is done."""
        known = np.flatnonzero(self.facts.known)[:WARM_UP_PROMPT].tolist()
        room = min(self.expert.max_model_len, self.amateur.max_model_len) - WARM_UP_TOKENS - 1
        if room < 1:
            raise EngineStartError(f"a max_model_len below {WARM_UP_TOKENS + 2} leaves no room for a trajectory")
        known = known[:room]
        problems = [Problem(id=str(size), prompt_token_ids=known[:size]) for size in range(len(known), 0, -6)]
        top_k = min(DEFAULT_TOP_K, self.max_top_k)  # kernels are compiled for a k
        sampling, turn = SamplingSettings(max_tokens=WARM_UP_TOKENS, top_k=top_k), Turn()
        await asyncio.gather(*(self._trajectory(problem, 0, sampling, turn) for problem in problems))

    async def trajectory(
        self, problem: Problem, sample_index: int, sampling: SamplingSettings, turn: Turn
    ) -> Trajectory:
        """The expert's trajectory of a problem, or the problem's own completion, scored by both models.

        Both engines start requests with a smaller `priority` first; among equals, the earlier one. Raises
        TrajectoryError if this problem fails; others are not affected.
        """
        try:
            trajectory = await self._trajectory(problem, sample_index, sampling, turn)
        except TrajectoryError as error:
            metrics.count_failure(error.type)
            raise
        except asyncio.CancelledError:
            metrics.TRAJECTORIES.labels("cancelled").inc()
            raise
        except Exception:
            metrics.count_failure("internal_error")
            raise
        metrics.count_trajectory(trajectory, self.expert.facts.vocab_size)
        return trajectory

    async def _trajectory(
        self, problem: Problem, sample_index: int, sampling: SamplingSettings, turn: Turn
    ) -> Trajectory:
        async with turn.rendering:
            prompt = await self.prompts.render(problem, sampling)
        self.prompts.check(prompt, problem.token_ids or [], sampling.max_tokens)
        try:
            async with turn.slot():
                if problem.token_ids:
                    answer = await self._score_completion(prompt.expert, problem.token_ids, sampling, turn.priority)
                else:
                    seed = _request_seed(sampling.seed, problem.id, sample_index)
                    answer = await self._generate(prompt.expert, seed, sampling, turn.priority)
            token_ids, top_ids, expert_logprobs, finish_reason = answer
            prompt_array = np.array(prompt.expert, np.int32)
            own = None if prompt.amateur is None else np.array(prompt.amateur, np.int32)
            amateur_logprobs = await self._score_by_amateur(prompt_array, own, token_ids, top_ids, turn.priority)
        except (EngineDeadError, EngineGenerateError) as error:
            raise TrajectoryError("engine_error", self.failure() or str(error) or repr(error)) from error
        return Trajectory(
            problem.id, sample_index, prompt_array, token_ids, top_ids, expert_logprobs, amateur_logprobs, finish_reason
        )

    def card(self, engine: Engine) -> ModelCard:
        """The card of one of the two engines, for GET /v1/models."""
        return ModelCard(
            id=str(engine.facts.folder),
            created=self._started_at,
            role=engine.role,
            vocab_size=engine.facts.vocab_size,
            max_model_len=engine.max_model_len,
            max_logprobs=engine.max_logprobs,
            slots=engine.slots,
            dtype=str(engine.llm.model_config.dtype).removeprefix("torch."),
            model_fingerprint=engine.facts.model_fingerprint,
            tokenizer_fingerprint=engine.facts.tokenizer_fingerprint,
            chat_template_digest=engine.facts.chat_template_digest,
            unknown_tokens=self.facts.differences if engine.role == "amateur" else [],
            end_token_ids=self.prompts.end_tokens if engine.role == "expert" else None,
            amateur_prompt=self.prompts.amateur_prompt if engine.role == "amateur" else None,
            own_prompt_with=self.prompts.own_with if engine.role == "amateur" else {},
            writes_date=self.prompts.writes_date[engine.role],
        )

    def shutdown(self) -> None:
        """Stop both engines and their processes in parallel: each waits some seconds for its own."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(Engine.stop, (self.expert, self.amateur)))

    async def _generate(
        self, prompt: list[int], seed: int | None, sampling: SamplingSettings, priority: int
    ) -> ExpertAnswer:
        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            stop_token_ids=self._ends(sampling),
            logprobs=sampling.top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        completion = (await self.expert.run(prompt, params, priority)).outputs[0]
        if completion.finish_reason not in ("stop", "length"):
            raise TrajectoryError("engine_error", f"vLLM ended the request with {completion.finish_reason!r}")
        finish_reason: FinishReason = "stop" if completion.finish_reason == "stop" else "length"
        top_ids, logprobs = _top_k(completion.logprobs, sampling.top_k)
        return np.array(completion.token_ids, np.int32), top_ids, logprobs, finish_reason

    async def _score_completion(
        self, prompt: list[int], completion: list[int], sampling: SamplingSettings, priority: int
    ) -> ExpertAnswer:
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=sampling.top_k,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            ignore_eos=True,
        )
        rows = await _twice(
            functools.partial(self.expert.run, prompt + completion, params, priority),
            lambda output: output.prompt_logprobs,
        )
        top_ids, logprobs = _top_k(rows, sampling.top_k, first_row=len(prompt))
        finish_reason: FinishReason = "stop" if completion[-1] in self._ends(sampling) else "length"
        return np.array(completion, np.int32), top_ids, logprobs, finish_reason

    def _ends(self, sampling: SamplingSettings) -> list[int]:
        """The ids at which a trajectory ends: the expert's, and the request's."""
        return sorted({*self.prompts.end_tokens, *sampling.stop_token_ids})

    async def _score_by_amateur(
        self,
        prompt: npt.NDArray[np.int32],
        own: npt.NDArray[np.int32] | None,
        completion: npt.NDArray[np.int32],
        top_ids: npt.NDArray[np.int32],
        priority: int,
    ) -> npt.NDArray[np.float32]:
        scores = np.full(top_ids.shape, -np.inf, np.float32)
        try:
            passes = list(scoring_passes(prompt, completion, top_ids, self.facts.known, own))
        except ValueError as error:
            raise TrajectoryError("unknown_prompt", str(error)) from error
        for scoring in passes:
            params = scoring_params(scoring, self._native)
            rows = await _twice(
                functools.partial(self.amateur.run, scoring.prompt_token_ids, params, priority),
                lambda output: output.prompt_token_id_logprobs,
            )
            belongs = scoring.steps >= 0
            scores[scoring.steps[belongs]] = rows[belongs]
        return scores


ExpertAnswer = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float32], Literal["stop", "length"]]
"""token_ids [T], top_ids [T, k], expert_logprobs [T, k], finish_reason."""


async def _twice(run: Callable[[], Awaitable[RequestOutput]], scores: Callable[[RequestOutput], Any]) -> Any:
    """Run a request and return its scores, with one retry: vLLM may drop the scores of a preempted request."""
    for _ in range(2):
        if (found := scores(await run())) is not None:
            return found
    raise TrajectoryError("no_scores", "vLLM returned no scores, twice; try again")


def _top_k(flat: Any, k: int, first_row: int = 0) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Entries 1..k of each row of vLLM's flat log-probabilities; entry 0 is the generated token."""
    starts = np.array(flat.start_indices[first_row:], np.int64)
    entries = starts[:, None] + np.arange(1, k + 1)
    if len(starts) and (np.array(flat.end_indices[first_row:]) - starts != k + 1).any():
        raise TrajectoryError("engine_error", f"vLLM returned rows that do not hold {k} + 1 log-probabilities")
    return np.array(flat.token_ids, np.int32)[entries], np.array(flat.logprobs, np.float32)[entries]


def _request_seed(seed: int | None, problem_id: str, sample_index: int) -> int | None:
    """A seed for each trajectory, independent of what else is in the request."""
    if seed is None:
        return None
    digest = hashlib.sha256(json.dumps([seed, problem_id, sample_index]).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1

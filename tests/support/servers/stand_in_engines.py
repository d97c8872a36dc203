"""A server whose two engines answer from memory. All else is real: its command line, HTTP, signals, jobs, watchdog.

It stands where vLLM plays no part: in how a server drains and ends, and in what becomes of its jobs. It is ready in a
second, and how long a trajectory takes is known. In: the server's own arguments. Each engine has a process of its own
that only sleeps, so that a test sees it end with the server. What is claimed of engines is tried on real ones.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np

import server.engines.forkserver
import server.engines.start
from server.__main__ import main as serve
from server.engines.engine import Engine
from server.engines.pair import Pair
from server.engines.preflight import ModelFacts, PairFacts
from server.settings import Role, ServerSettings

CONTEXT, SLOTS, TOKEN_SECONDS = 256, 64, 0.002


class StandIn(Engine):
    """An engine that makes up its answers, the same ones to the same prompt and seed."""

    def __init__(self, role: Role, facts: ModelFacts) -> None:
        self.role, self.facts = role, facts
        self.llm: Any = SimpleNamespace(
            model_config=SimpleNamespace(
                max_model_len=CONTEXT, max_logprobs=-1, dtype="float32", try_get_generation_config=dict
            ),
            vllm_config=SimpleNamespace(
                scheduler_config=SimpleNamespace(max_num_seqs=SLOTS),
                parallel_config=SimpleNamespace(data_parallel_size=1),
            ),
            errored=False,
        )
        self._hung = ""
        self._process = subprocess.Popen(["sleep", "3600"])
        self._free: asyncio.Semaphore | None = None

    async def run(self, prompt_token_ids: list[int], params: Any, priority: int) -> Any:
        if self._free is None:
            self._free = asyncio.Semaphore(SLOTS)
        rng = np.random.default_rng(zlib.crc32(json.dumps([prompt_token_ids, params.seed]).encode()))
        if params.extra_args:  # the amateur is asked to score
            shape = params.extra_args["score_shape"]
            return SimpleNamespace(prompt_token_id_logprobs=-rng.exponential(3, shape).astype(np.float32))
        async with self._free:
            await asyncio.sleep(params.max_tokens * TOKEN_SECONDS)
        return SimpleNamespace(outputs=[completion(rng, params.max_tokens, params.logprobs, self.facts.vocab_size)])

    async def watch(self, seconds: float) -> None:
        """It never hangs."""

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def completion(rng: np.random.Generator, tokens: int, k: int, vocabulary: int) -> Any:
    """What vLLM gives for a completion: in each row the token that was taken, then the k best ids."""
    logits = rng.normal(0, 3, (tokens, vocabulary))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    best = np.argsort(-logprobs, axis=1)[:, [0, *range(k)]]
    starts = np.arange(tokens) * (k + 1)
    rows = SimpleNamespace(
        start_indices=starts.tolist(), end_indices=(starts + k + 1).tolist(), token_ids=best.ravel().tolist(),
        logprobs=np.take_along_axis(logprobs, best, 1).ravel().tolist(),
    )  # fmt: skip
    return SimpleNamespace(token_ids=best[:, 0].tolist(), finish_reason="length", logprobs=rows)


class StandInPair(Pair):
    """The pair over them."""

    def shutdown(self) -> None:
        for engine in (self.expert, self.amateur):
            engine.stop()


def start_pair(settings: ServerSettings, facts: PairFacts, stopping: Any) -> Pair:
    return StandInPair(StandIn("expert", facts.expert), StandIn("amateur", facts.amateur), facts, native=False)


def main() -> None:
    """The server's command, in a process of its own."""
    server.engines.start.start_pair = start_pair
    server.engines.forkserver.start = lambda: None  # there is no engine to fork
    serve()

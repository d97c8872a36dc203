"""A server whose two engines answer from memory. All else is real: its command line, HTTP, signals, jobs, watchdog.

It is for tests in which vLLM plays no part: how a server drains and ends, and what becomes of its jobs. It is ready in
a second, and a trajectory takes a known time. In: the server's own arguments. Each engine has a process of its own that
only sleeps, so that a test sees it end with the server. Tests of engines use real ones.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

import server.engines.forkserver
import server.engines.start
from server.__main__ import main as serve
from server.engines.engine import Engine
from server.engines.pair import Pair
from server.engines.preflight import ModelFacts, PairFacts
from server.settings import Role, ServerSettings

CONTEXT, SLOTS, TOKEN_SECONDS = 256, 64, 0.002
Floats = npt.NDArray[np.float64]


class StandIn(Engine):
    """An engine that makes up its answers: the same for the same prompt and seed."""

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
        if params.logprobs is None:  # the expert scores a given completion
            logprobs = made_up(rng, len(prompt_token_ids), self.facts.vocab_size)
            return SimpleNamespace(prompt_logprobs=flat_rows(logprobs, prompt_token_ids, params.prompt_logprobs))
        logprobs = made_up(rng, params.max_tokens, self.facts.vocab_size)
        taken = logprobs.argmax(axis=1).tolist()
        rows = flat_rows(logprobs, taken, params.logprobs)
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=taken, finish_reason="length", logprobs=rows)])

    async def watch(self, seconds: float) -> None:
        """Does nothing: a stand-in never hangs."""

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def made_up(rng: np.random.Generator, tokens: int, vocabulary: int) -> Floats:
    """Log-probabilities over the whole vocabulary: [tokens, vocabulary]."""
    logits = rng.normal(0, 3, (tokens, vocabulary))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def flat_rows(logprobs: Floats, taken: list[int], k: int) -> Any:
    """Log-probabilities in vLLM's flat format: in each row the chosen token, then the k best ids."""
    ids = np.column_stack((taken, np.argsort(-logprobs, axis=1)[:, :k]))
    starts = np.arange(len(ids)) * (k + 1)
    return SimpleNamespace(
        start_indices=starts.tolist(), end_indices=(starts + k + 1).tolist(), token_ids=ids.ravel().tolist(),
        logprobs=np.take_along_axis(logprobs, ids, 1).ravel().tolist(),
    )  # fmt: skip


class StandInPair(Pair):
    """The pair over two stand-ins."""

    def shutdown(self) -> None:
        for engine in (self.expert, self.amateur):
            engine.stop()


STARTING = "STAND_INS_START_UNTIL_STOPPED"
"""With this environment variable the stand-ins are ready only when the server is told to stop."""


def start_pair(settings: ServerSettings, facts: PairFacts, stopping: threading.Event) -> Pair:
    expert, amateur = StandIn("expert", facts.expert), StandIn("amateur", facts.amateur)
    if STARTING in os.environ:
        stopping.wait()
    return StandInPair(expert, amateur, facts, native=False)


def main() -> None:
    """The server's command, in a process of its own."""
    server.engines.start.start_pair = start_pair
    server.engines.forkserver.start = lambda: None  # there is no engine to fork
    serve()

"""One vLLM engine in processes of its own: starts it, runs requests, detects a hang, and stops it.

In: engine arguments from `server.settings`. Out: vLLM's outputs, unchanged. Does not know of pairs.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from client import child_errors
from client.environment import environment, sockets_in
from client.errors import LightReasonerError, reason_of
from server import metrics
from server.engines import forkserver
from server.engines.logprobs.arrays import ArrayOutputs
from server.engines.preflight import ModelFacts
from server.engines.signals import STOP, held
from server.logs import log
from server.settings import EngineArguments, Role, cpu_threads

SPAWN = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
"""An engine's processes must not inherit this one's threads and locks."""
SAMPLER = "VLLM_USE_FLASHINFER_SAMPLER"
"""Turns FlashInfer's sampler on or off. vLLM's own, the default here, needs no kernel that compiles for a minute at the
first request with a top_p."""
LOOKS = 20
"""How often to check an engine's steps, within the time after which it counts as hung."""


class EngineStartError(LightReasonerError):
    """An engine did not start. The message names its role, and vLLM's reason."""


def workers_of(arguments: EngineArguments) -> int:
    """Processes over which an engine's model is spread, in all its data-parallel ranks together."""
    sizes = ("tensor_parallel_size", "pipeline_parallel_size")
    workers = math.prod(arguments.get(size) or 1 for size in sizes)
    return workers * (arguments.get("data_parallel_size") or 1) if workers > 1 else 1


def start_error(role: Role, model: str, reason: str) -> EngineStartError:
    """The error of an engine that did not start. `reason`: vLLM's."""
    return EngineStartError(f"the {role}'s engine did not start ({model}): {reason}")


class StepCounter(StatLoggerBase):
    """Counts an engine's steps: vLLM records each."""

    def __init__(self) -> None:
        self.taken = 0

    def record(self, *_: Any, **__: Any) -> None:
        self.taken += 1

    def log_engine_initialized(self) -> None: ...


@contextlib.contextmanager
def reading(role: Role, model: str) -> Iterator[None]:
    """A context for vLLM to read an engine's arguments. Raises EngineStartError with the cause if it rejects them."""
    with child_errors.collected() as cause:
        try:
            with held():  # vLLM may inspect a model's class in a process of its own
                yield
        except Exception as error:
            raise start_error(role, model, cause() or reason_of(error)) from error


def configuration(role: Role, arguments: EngineArguments) -> VllmConfig:
    """vLLM's own configuration of an engine; loads and starts nothing. Raises EngineStartError."""
    with reading(role, arguments["model"]):
        return AsyncEngineArgs(**arguments).create_engine_config()


class Engine:
    """A running engine."""

    def __init__(self, role: Role, facts: ModelFacts, arguments: EngineArguments, cores: str | None) -> None:
        """Start the engine; blocks until it has loaded. `cores`: on a CPU, the cores for its threads.

        Raises EngineStartError.
        """
        self.role, self.facts = role, facts
        self._steps, self._hung = StepCounter(), ""
        self._sockets = tempfile.TemporaryDirectory(prefix="lr-")
        before = set(multiprocessing.active_children())
        try:
            variables = SPAWN | {SAMPLER: os.environ.get(SAMPLER, "0")}  # read as its processes start
            variables |= cpu_threads(cores, workers_of(arguments)) if cores else {}
            variables |= sockets_in(self._sockets.name)
            with child_errors.collected() as cause:
                try:
                    with held(), environment(variables), forkserver.used(cores):
                        self.llm = AsyncLLM.from_engine_args(
                            AsyncEngineArgs(**arguments), stat_loggers=[lambda _config, _index: self._steps]
                        )
                    self.llm.output_processor = ArrayOutputs.instead_of(self.llm.output_processor)
                except Exception as error:
                    failed = start_error(role, arguments["model"], cause() or reason_of(error))
                    failed.may_pass = True  # another process may hold the card's memory
                    raise failed from error
        finally:
            metrics.ENGINES.adopt(role)
        self._processes: set[BaseProcess] = set(multiprocessing.active_children()) - before

    @property
    def max_model_len(self) -> int:
        return self.llm.model_config.max_model_len

    @property
    def max_logprobs(self) -> int:
        """The most ids per step that this engine returns; vLLM's -1 means all."""
        allowed = self.llm.model_config.max_logprobs
        return self.facts.vocab_size if allowed == -1 else allowed

    @property
    def slots(self) -> int:
        """Requests that run at a time, in all data-parallel ranks together."""
        config = self.llm.vllm_config
        return config.scheduler_config.max_num_seqs * config.parallel_config.data_parallel_size

    @property
    def death(self) -> str | None:
        """Why the engine no longer works; None while it does."""
        return (self._hung or str(self.llm.dead_error)) if self.llm.errored else None

    async def run(self, prompt_token_ids: list[int], params: SamplingParams, priority: int) -> RequestOutput:
        """Run one request to its end. Cancelling the call aborts the request in the engine."""
        final, request_id, began = None, uuid.uuid4().hex, time.perf_counter()
        async for output in self.llm.generate(tokens_input(prompt_token_ids), params, request_id, priority=priority):
            final = output
        assert final is not None and final.finished
        metrics.ENGINE_SECONDS.labels(self.role).observe(time.perf_counter() - began)
        return final

    async def watch(self, seconds: float) -> None:
        """Kill the engine if it has requests but takes no step for `seconds`. Then its death is reported.

        Only time in which this process could check counts: an engine on a suspended machine has not hung.
        """
        seen, idle = -1, 0.0
        while not self.llm.errored:
            await asyncio.sleep(seconds / LOOKS)
            if self._steps.taken != seen or not self.llm.output_processor.has_unfinished_requests():
                seen, idle = self._steps.taken, 0.0
                continue
            idle += seconds / LOOKS
            if idle >= seconds:
                self._hung = f"it took no step for {seconds:g} s, though it had requests, and was killed"
                log.error("the %s's engine: %s", self.role, self._hung)
                for process in self._processes:
                    if process.pid:
                        kill_process_tree(process.pid)
                return

    def stop(self) -> None:
        """Stop the engine and its processes; blocks for some seconds at most."""
        for process in self._processes:
            if process.pid and process.is_alive():
                os.kill(process.pid, STOP)
        self.llm.shutdown()
        self._sockets.cleanup()
        # At the interpreter's end vLLM's __del__ calls shutdown again, when modules that it uses are gone.
        self.llm.shutdown = lambda *_, **__: None  # type: ignore[method-assign]

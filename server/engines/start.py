"""Starts a pair's two engines with the arguments and cores that each needs.

In: settings and what the models' files say. Out: a running `Pair`, or the reason why there is none.
"""

from __future__ import annotations

import os
import threading

from vllm.platforms import current_platform
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from server.engines.engine import Engine, EngineStartError
from server.engines.pair import Pair
from server.engines.preflight import ModelFacts, PairFacts
from server.settings import Role, ServerSettings, cpu_cores, engine_arguments

CPU_WORKER = "server.engines.worker.ScoringWorker"


def start_pair(settings: ServerSettings, facts: PairFacts, stopping: threading.Event) -> Pair:
    """Start both engines; blocks until both have loaded, or gives up between them when `stopping` is set.

    Raises EngineStartError or SettingsError.
    """
    on_cpu = current_platform.is_cpu()
    bind = on_cpu and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    weights: dict[Role, int] = {"expert": facts.expert.weight_bytes, "amateur": facts.amateur.weight_bytes}
    cores = cpu_cores(sorted(os.sched_getaffinity(0)))
    engines: dict[Role, Engine] = {}
    roles: tuple[tuple[Role, ModelFacts], ...] = (("expert", facts.expert), ("amateur", facts.amateur))
    try:
        for role, model in roles:
            if stopping.is_set():
                raise EngineStartError("told to stop before both engines had started")
            arguments = engine_arguments(settings, role, weights, on_cpu) | {"model": str(model.folder)}
            if on_cpu and role == "amateur":
                arguments["worker_cls"] = CPU_WORKER
            # vLLM's CPU build gives an engine's worker a process of its own in order to bind its threads. They are
            # bound here, so one process does: it starts sooner, and no step waits for another process.
            if bind and arguments.get("tensor_parallel_size", 1) == 1:
                arguments.setdefault("distributed_executor_backend", UniProcExecutor)
            engines[role] = Engine(role, model, arguments, cores[role] if bind else None)
        if not on_cpu and not engines["amateur"].llm.vllm_config.use_v2_model_runner:
            raise EngineStartError(
                "on a GPU the amateur needs vLLM's V2 model runner, and vLLM chose V1: unset"
                " VLLM_USE_V2_MODEL_RUNNER, or remove the engine argument under 'amateur:' that V2 does not support"
            )
    except BaseException:
        for engine in engines.values():
            engine.stop()
        raise
    return Pair(engines["expert"], engines["amateur"], facts, native=not on_cpu)

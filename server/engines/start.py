"""Starts a pair's two engines with the arguments and cores that each needs.

In: settings and facts from the models' files. Out: a running `Pair`, or the reason why there is none. Arguments that
vLLM's own configuration rejects are reported before any weights are loaded.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from typing import Any

import vllm.config.vllm as vllm_config
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from client.errors import did_you_mean, reason_of, shown
from client.models.mistral import folder_for_vllm, hugging_face_arguments
from server.engines.engine import Engine, EngineStartError, configuration, reading, start_error, workers_of
from server.engines.pair import Pair
from server.engines.preflight import ModelFacts, PairFacts
from server.logs import log
from server.memory import EngineShape, cpu_arguments, gpu_arguments
from server.settings import (
    GIB,
    ROLES,
    EngineArguments,
    Role,
    ServerSettings,
    SettingsError,
    cpu_cores,
    engine_arguments,
    refuse_changes,
)

SCHEDULERS = {
    False: "server.engines.logprobs.scheduler.HoldingScheduler",
    True: "server.engines.logprobs.scheduler.HoldingAsyncScheduler",
}
"""The expert's scheduler, by whether vLLM schedules asynchronously."""
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
"""Engine arguments with the number of processes over which a model is spread, or copied."""
V1_ON_CPU: dict[Role, EngineArguments] = {
    # V1 rewinds the random generator of a seeded request whose prompt is cut into chunks. A CPU generator cannot
    # rewind, and the engine dies.
    "expert": {"enable_chunked_prefill": False},
    "amateur": {"worker_cls": "server.engines.worker.ScoringWorker"},
}
"""Engine arguments that vLLM's V1 model runner needs on a CPU, where it is the default."""
CUDA_DRIVER = "libcuda.so.1"


def start_pair(settings: ServerSettings, facts: PairFacts, stopping: threading.Event) -> Pair:
    """Start both engines; blocks until both have loaded, or gives up between them when `stopping` is set.

    Raises EngineStartError or SettingsError.
    """
    on_cpu = current_platform.is_cpu()
    if not on_cpu:
        # vLLM and nvidia-smi count cards so. CUDA would count the fastest first, and take another card than planned.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    bind = on_cpu and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ
    models: dict[Role, ModelFacts] = {"expert": facts.expert, "amateur": facts.amateur}
    arguments = sized_arguments(settings, models, on_cpu)
    configurations = {role: configuration(role, arguments[role]) for role in ROLES}
    reasons = {role: v1_reason(configurations[role]) for role in ROLES}
    if reasons["amateur"] and not on_cpu:
        raise EngineStartError(
            f"on a GPU the amateur needs vLLM's V2 model runner, and vLLM would take V1: {reasons['amateur']}"
        )
    ahead = {role: bool(configurations[role].scheduler_config.async_scheduling) for role in ROLES}
    arguments["expert"].setdefault("scheduler_cls", SCHEDULERS[ahead["expert"]])
    cores = cpu_cores(sorted(os.sched_getaffinity(0)))
    engines: dict[Role, Engine] = {}
    try:
        for role, model in models.items():
            if stopping.is_set():
                raise EngineStartError("told to stop before both engines had started")
            if on_cpu and reasons[role]:
                refuse_changes(role, arguments[role], V1_ON_CPU[role])
                arguments[role] |= V1_ON_CPU[role]
            # vLLM's CPU build gives an engine's worker a process of its own in order to bind its threads. They are
            # bound here, so one process is enough: it starts sooner, and no step waits for another process.
            if bind and workers_of(arguments[role]) == 1:
                arguments[role].setdefault("distributed_executor_backend", UniProcExecutor)
            engines[role] = Engine(role, model, arguments[role], cores[role] if bind else None)
            runner, scheduling = "V1" if reasons[role] else "V2", "asynchronous" if ahead[role] else "synchronous"
            log.info("%s: vLLM's model runner %s, %s scheduling", role, runner, scheduling)
    except BaseException:
        for engine in engines.values():
            engine.stop()
        raise
    return Pair(engines["expert"], engines["amateur"], facts, native=reasons["amateur"] is None)


def sized_arguments(
    settings: ServerSettings, models: Mapping[Role, ModelFacts], on_cpu: bool
) -> dict[Role, EngineArguments]:
    """The vLLM engine arguments of both engines. Raises SettingsError if the engines do not fit."""
    folders = {role: models[role].folder for role in ROLES}
    given = {
        role: hugging_face_arguments(folder)
        | engine_arguments(settings, role, on_cpu)
        | {"model": str(folder_for_vllm(folder))}
        for role, folder in folders.items()
    }
    shapes = {role: engine_shape(role, given[role], models[role].weight_bytes) for role in ROLES}
    if on_cpu:
        sized = cpu_arguments(shapes, given)
    else:
        devices = {device for shape in shapes.values() for device in shape.devices}
        sized = gpu_arguments(shapes, given, {device: _card_memory(device) for device in devices})
    return {role: sized[role] | given[role] for role in ROLES}


def engine_shape(role: Role, given: EngineArguments, weight_bytes: int) -> EngineShape:
    """An engine's shape, by vLLM's own reading of the model's configuration. `weight_bytes`: of the model's files."""
    for name in given:
        if name not in AsyncEngineArgs.__dataclass_fields__:
            meant = did_you_mean(name, AsyncEngineArgs.__dataclass_fields__) or "; names are spelled with underscores"
            raise SettingsError(f"{role}.{name} is no vLLM engine argument{meant}")
    for name in PARALLEL:
        if type(parts := given.get(name, 1)) is not int or parts < 1:
            raise SettingsError(f"{role}.{name} must be a whole number of at least 1, not {shown(parts)}")
    with reading(role, given["model"]):
        arguments = AsyncEngineArgs(**given)
        model: Any = arguments.create_model_config()
    if model.is_encoder_decoder or model.runner_type != "generate":
        kind = "an encoder-decoder" if model.is_encoder_decoder else "a model that generates no text"
        raise start_error(role, given["model"], f"it is {kind}; the service needs a causal language model")
    config: Any = model.hf_text_config
    tensor, pipeline = arguments.tensor_parallel_size, arguments.pipeline_parallel_size
    value_bytes, saved = model.dtype.itemsize, getattr(model.hf_config, "dtype", None) or model.dtype
    if not model.is_quantized:
        weight_bytes = weight_bytes * value_bytes // saved.itemsize
    layers = -(-model.get_total_num_hidden_layers() // pipeline)
    heads = 1 if model.use_mla else max(1, model.get_total_num_kv_heads() // tensor)
    cached = STR_DTYPE_TO_TORCH_DTYPE.get(arguments.kv_cache_dtype, model.dtype).itemsize
    between = 1 if model.use_mla else 2  # keys and values, or what they are made from
    wide = getattr(config, "intermediate_size", None)
    wide = 3 * (wide if isinstance(wide, int) else 4 * model.get_hidden_size())
    if chosen := model.get_num_experts_per_tok():
        wide = max(wide, chosen * (3 * getattr(config, "moe_intermediate_size", 0) + model.get_hidden_size()))
    return EngineShape(
        devices=_devices(role, arguments),
        weights=max(0, weight_bytes // (tensor * pipeline) - int(arguments.cpu_offload_gb * GIB)),
        layers=layers,
        columns=wide // tensor + 6 * model.get_hidden_size(),
        vocabulary=model.get_vocab_size(),
        value_bytes=value_bytes,
        token_bytes=layers * heads * between * model.get_head_size() * cached,
        context=model.max_model_len,
        graphs=not arguments.enforce_eager,
    )


def _devices(role: Role, arguments: AsyncEngineArgs) -> tuple[int, ...]:
    """The cards of an engine, numbered as this process sees them. vLLM takes the first that it needs."""
    parts = arguments.tensor_parallel_size * arguments.pipeline_parallel_size * arguments.data_parallel_size
    named: Any = list(range(parts)) if arguments.device_ids in (None, []) else arguments.device_ids
    kinds = {type(name) for name in named} if isinstance(named, list) else set()
    if kinds not in ({int}, {str}):
        raise SettingsError(
            f"{role}.device_ids must be a list of numbers, from 0, or of UUIDs in quotes, not {shown(named)}"
        )
    if len(named) < parts:
        raise SettingsError(f"{role}.device_ids {named} are too few: an engine of {parts} parts needs a card for each")
    if kinds == {int}:
        return tuple(named[:parts])
    return tuple(_visible_device(role, name) for name in named[:parts])


def _visible_device(role: Role, name: str) -> int:
    """The number of a card among those that this process sees. `name`: its UUID, or its number among all cards."""
    platform = current_platform
    try:
        wanted = platform.device_control_id_to_physical_device_id(name)
        seen = [platform.device_id_to_physical_device_id(card) for card in range(platform.device_count())]
    except Exception as error:  # of the driver's library, which vLLM asks
        raise SettingsError(f"{role}.device_ids: {name!r} names no GPU here: {reason_of(error)}") from error
    if wanted not in seen:
        raise SettingsError(f"{role}.device_ids: GPU {name!r} is not visible; CUDA_VISIBLE_DEVICES hides it")
    return seen.index(wanted)


def _card_memory(device: int) -> int:
    """Bytes of a visible card. Creates no context on it."""
    if current_platform.is_unspecified():
        raise SettingsError(
            "vLLM finds no GPU here, and this is its build for GPUs: see that nvidia-smi lists one (a container must be"
            " given it), or install lightreasoner[cpu] in place of lightreasoner[server]"
        )
    count = current_platform.device_count()
    if not 0 <= device < count:
        raise SettingsError(
            f"GPU {device} is asked for, and {count} are visible, from 0: see device_ids, tensor_parallel_size,"
            " pipeline_parallel_size, data_parallel_size and CUDA_VISIBLE_DEVICES"
        )
    try:
        return _counted_by_cuda(device) or current_platform.get_device_total_memory(device)
    except Exception as error:
        raise SettingsError(f"the driver does not say how much memory GPU {device} has: {reason_of(error)}") from error


def _counted_by_cuda(device: int) -> int:
    """Bytes of a visible card, as an engine on it will count them; 0 if CUDA's driver does not say.

    The driver's management library, which vLLM asks, does not know a share of a card (MIG): it reports the whole card,
    or fails.
    """
    handle, size = ctypes.c_int(), ctypes.c_size_t()
    try:
        cuda = ctypes.CDLL(CUDA_DRIVER)
        failed = (
            cuda.cuInit(0)
            or cuda.cuDeviceGet(ctypes.byref(handle), device)
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(size), handle)
        )
    except (OSError, AttributeError):
        return 0
    return 0 if failed else size.value


def v1_reason(config: VllmConfig) -> str | None:
    """Why vLLM would run an engine with its V1 model runner, and what to do; None if it takes V2."""
    if config.use_v2_model_runner:
        return None
    if envs.VLLM_USE_V2_MODEL_RUNNER is False:
        return "VLLM_USE_V2_MODEL_RUNNER=0 is set; unset it"
    if not vllm_config.HAS_TRITON:
        return (
            "V2 requires Triton, and vLLM finds none that works here (its log, above, says why);"
            " install the Triton that vLLM's GPU build requires"
        )
    unsupported = ", ".join(config._get_v2_model_runner_unsupported_features())
    return f"V2 does not yet support {unsupported}; remove the engine argument under 'amateur:' that asks for it"

"""What a server is started with: server.yaml and flags, checked, with defaults that fit the machine.

In: a YAML file and flags (a flag wins). Out: frozen settings, and for each engine the vLLM arguments that let
two engines live on one machine. Imports neither torch nor vLLM.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.errors import LightReasonerError

Role = Literal["expert", "amateur"]
EngineArguments = dict[str, Any]

GIB = 1024**3
MAX_LOGPROBS = 128
KV_CACHE_SHARE = 0.1
"""Of the machine's memory, for each engine's key-value cache on a CPU, between 0.5 and 4 GiB."""
GPU_MEMORY_SHARE = 0.9
"""Of a GPU's memory, for both engines together."""
SMALLEST_GPU_SHARE = 0.15
"""Of a GPU's memory, for one engine: activations and cache do not shrink with the weights."""
RESERVED: dict[str, Any] = {
    "logprobs_mode": "raw_logprobs",
    "generation_config": "vllm",
    "scheduling_policy": "priority",
}
"""Engine arguments that the answer's meaning rests on, and by which requests go before jobs."""
RESERVED_AMATEUR: dict[str, Any] = {"enable_prefix_caching": False}
"""A cached prefix would leave scored rows uncomputed."""
RESERVED_CPU_EXPERT: dict[str, Any] = {"enable_chunked_prefill": False}
"""On a CPU, vLLM's V1 runner rewinds the generator of a seeded request whose prompt is cut into chunks, which a CPU
generator cannot do: the engine dies of it."""


class SettingsError(LightReasonerError):
    """A setting that is missing or wrong: names the file or flag and the key."""


class ServerLimits(BaseModel):
    """What the service takes at most; beyond it a request is refused, never delayed without bound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(16 * 1024**2, ge=1024)
    queued_trajectories: int = Field(4096, ge=1)  # of requests, accepted and not yet answered
    open_jobs: int = Field(1000, ge=1)
    job_trajectories: int = Field(1_000_000, ge=1)  # of one job: its problems, n of each


class ServerSettings(BaseModel):
    """server.yaml. `expert` and `amateur` are vLLM engine arguments, passed through as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    expert: EngineArguments = Field(default_factory=dict)
    amateur: EngineArguments = Field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    bucket: str | None = None  # where jobs live and write; without one there are none
    api_key_file: Path | None = None
    grace_seconds: float = Field(30.0, ge=0.0)  # for what is running when the server is told to stop
    lease_seconds: float = Field(30.0, ge=1.0)  # without a beat for this long, a job's owner is taken for dead
    hang_seconds: float = Field(300.0, ge=1.0)  # an engine that has requests and takes no step for this long is killed
    limits: ServerLimits = Field(default_factory=ServerLimits)

    def arguments(self, role: Role) -> EngineArguments:
        return self.expert if role == "expert" else self.amateur


def load_settings(config: Path | None, **flags: Any) -> ServerSettings:
    """Settings from a file and flags; `expert` and `amateur` among the flags are model names.

    Raises SettingsError naming the file and the key.
    """
    values = _read(config) if config else {}
    for role in ("expert", "amateur"):
        section = values.get(role) or {}
        if not isinstance(section, dict):
            raise SettingsError(f"{config}: '{role}' must be a mapping of vLLM engine arguments, as 'model: …'")
        model = flags.pop(role, None) or section.get("model")
        if not model:
            raise SettingsError(f"no {role} model: give --{role} MODEL, or '{role}.model' in --config")
        values[role] = section | {"model": str(model)}
        _refuse_changes(role, section, RESERVED | (RESERVED_AMATEUR if role == "amateur" else {}))
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return ServerSettings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{config or 'settings'}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def engine_arguments(settings: ServerSettings, role: Role, weights: dict[Role, int], on_cpu: bool) -> EngineArguments:
    """The vLLM engine arguments of one engine: what the pair needs, our defaults, then the user's own.

    `weights`: bytes of each model's weights, by which a GPU's memory is shared out.
    """
    given = settings.arguments(role)
    defaults: EngineArguments = {"max_logprobs": MAX_LOGPROBS, "use_tqdm_on_load": False}
    if on_cpu:
        defaults |= {"enforce_eager": True, "kv_cache_memory_bytes": _cpu_kv_cache()}
    elif "kv_cache_memory_bytes" not in given:
        defaults["gpu_memory_utilization"] = gpu_share(weights[role], sum(weights.values()))
    needed = RESERVED | (RESERVED_AMATEUR if role == "amateur" else RESERVED_CPU_EXPERT if on_cpu else {})
    _refuse_changes(role, given, needed)
    return defaults | given | needed


def _refuse_changes(role: Role, given: EngineArguments, needed: EngineArguments) -> None:
    for key, value in needed.items():
        if given.get(key, value) != value:
            raise SettingsError(f"{role}.{key} must be {value!r} for this service; remove it from the configuration")


def gpu_share(weights: int, weights_of_both: int) -> float:
    """One engine's share of a GPU's memory: in proportion to its weights, but never too little to run."""
    share = GPU_MEMORY_SHARE * weights / weights_of_both
    return round(min(max(share, SMALLEST_GPU_SHARE), GPU_MEMORY_SHARE - SMALLEST_GPU_SHARE), 3)


def cpu_cores(cores: list[int]) -> dict[Role, str]:
    """Which cores each engine is bound to, separated by commas.

    The expert, which generates token by token, gets two thirds; the amateur only reads. A single core is shared.
    """
    if len(cores) < 2:
        both = ",".join(map(str, cores))
        return {"expert": both, "amateur": both}
    cut = len(cores) - max(1, len(cores) // 3)
    return {"expert": ",".join(map(str, cores[:cut])), "amateur": ",".join(map(str, cores[cut:]))}


def cpu_threads(cores: str) -> dict[str, str]:
    """Environment variables that bind an engine's threads to cores, for each OpenMP that torch may use."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "OMP_NUM_THREADS": str(cores.count(",") + 1),
        "GOMP_CPU_AFFINITY": cores.replace(",", " "),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
    }


def _cpu_kv_cache() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(min(max(KV_CACHE_SHARE * memory, GIB // 2), 4 * GIB))


def _read(config: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(config.read_text())
    except OSError as error:
        raise SettingsError(f"--config {config} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"--config {config} is not valid YAML: {error}") from None
    if not isinstance(values or {}, dict):
        raise SettingsError(f"--config {config} must be a mapping with sections 'expert:' and 'amateur:'")
    return values or {}

"""The server's settings, and the vLLM engine arguments that the pair needs.

In: checked values. Out: frozen settings, and for each engine its arguments and cores; `server.memory` shares the
memory. It reads neither files nor environment variables (`server.configuration` does), and imports neither torch nor
vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from client.errors import LightReasonerError

Role = Literal["expert", "amateur"]
ROLES: tuple[Role, ...] = get_args(Role)
EngineArguments = dict[str, Any]

GIB = 1024**3
MAX_LOGPROBS = 128
RESERVED: dict[str, Any] = {
    "logprobs_mode": "raw_logprobs",
    "generation_config": "vllm",
    "scheduling_policy": "priority",
    "disable_log_stats": False,
}
"""Engine arguments that the service needs: they fix what a result means, let requests pass jobs, and show the engine's
steps."""
RESERVED_AMATEUR: dict[str, Any] = {"enable_prefix_caching": False}
"""With a cached prefix, vLLM would skip rows that must be scored."""
PREFIX, NESTED = "LIGHTREASONER_", "__"
"""How environment variables name settings: LIGHTREASONER_PORT, LIGHTREASONER_LIMITS__BODY_BYTES."""
API_KEYS_VARIABLE = f"{PREFIX}API_KEYS"


class SettingsError(LightReasonerError):
    """A setting is missing or invalid. The message names the file and key, the environment variable or the flag."""


class ServerLimits(BaseModel):
    """The most that the service accepts. It rejects a request beyond a limit; it never queues without bound."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(16 * 1024**2, ge=1024)
    all_bodies_bytes: int = Field(256 * 1024**2, ge=1024)  # of requests that are read or answered
    unread_bytes: int = Field(256 * 1024**2, ge=1024)  # of lines that wait for their readers
    queued_trajectories: int = Field(4096, ge=1)  # of requests: accepted and not yet answered
    open_jobs: int = Field(1000, ge=1)
    job_trajectories: int = Field(1_000_000, ge=1)  # of one job: its problems times n


class ServerSettings(BaseSettings):
    """The keys of server.yaml. `expert` and `amateur` are vLLM engine arguments, passed through unchanged.

    It is made from its arguments alone; `server.configuration` adds the file, the environment and the flags.
    """

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=PREFIX, env_nested_delimiter=NESTED, env_ignore_empty=True
    )

    expert: EngineArguments = Field(default_factory=dict)
    amateur: EngineArguments = Field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    bucket: str | None = None  # where jobs and their RUNs are stored; without a bucket there are no jobs
    api_key_file: Path | None = None
    chat_template: Path | None = None  # a Jinja file, in place of the expert's chat template
    grace_seconds: float = Field(30.0, ge=0.0)  # for running requests when the server is told to stop
    lease_seconds: float = Field(30.0, ge=1.0)  # after this long without a heartbeat, another server takes the job
    hang_seconds: float = Field(300.0, ge=1.0)  # an engine with requests that takes no step for this long is killed
    limits: ServerLimits = Field(default_factory=ServerLimits)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    def arguments(self, role: Role) -> EngineArguments:
        return self.expert if role == "expert" else self.amateur


def engine_arguments(settings: ServerSettings, role: Role, on_cpu: bool) -> EngineArguments:
    """The vLLM engine arguments of one engine, except for memory: our defaults, the user's own, what the pair needs."""
    given = settings.arguments(role)
    defaults: EngineArguments = {"max_logprobs": MAX_LOGPROBS, "use_tqdm_on_load": False}
    if on_cpu:
        defaults["enforce_eager"] = True
    needed = RESERVED | (RESERVED_AMATEUR if role == "amateur" else {})
    refuse_changes(role, given, needed)
    return defaults | given | needed


def refuse_changes(
    role: Role, given: EngineArguments, needed: EngineArguments, place_of: Callable[[Role, str], str] = "{}.{}".format
) -> None:
    """Raise SettingsError if `given` changes an argument that the service needs. `place_of`: names its place."""
    for key, value in needed.items():
        if given.get(key, value) != value:
            raise SettingsError(f"{place_of(role, key)} must be {value!r} for this service; remove it")


def cpu_cores(cores: list[int]) -> dict[Role, str]:
    """The cores to which each engine is bound, separated by commas.

    The expert, which generates token by token, gets two thirds; the amateur only reads. A single core is shared.
    """
    if len(cores) < 2:
        both = ",".join(map(str, cores))
        return {"expert": both, "amateur": both}
    cut = len(cores) - max(1, len(cores) // 3)
    return {"expert": ",".join(map(str, cores[:cut])), "amateur": ",".join(map(str, cores[cut:]))}


def cpu_threads(cores: str, workers: int = 1) -> dict[str, str]:
    """Environment variables that bind an engine's threads to cores, for each OpenMP that torch may use.

    Several workers get a list of cores each, and vLLM binds them. They share cores if there are too few.
    """
    if workers > 1:
        each = cores.split(",")
        lists = [each[worker::workers] or [each[worker % len(each)]] for worker in range(workers)]
        return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(",".join, lists))}
    return {
        "VLLM_CPU_OMP_THREADS_BIND": cores,
        "OMP_NUM_THREADS": str(cores.count(",") + 1),
        "GOMP_CPU_AFFINITY": cores.replace(",", " "),
        "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{cores}]",
    }

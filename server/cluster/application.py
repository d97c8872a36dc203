"""The application for `serve run` and `serve deploy`: one front, and replicas of the pair behind it.

In: `args` of a Serve YAML (deploy/ray): settings as in server.yaml and on the command line, and the number of replicas.
Out: the deployments. `server.api` has the routes, keys, streaming and jobs; Ray Serve starts, scales and replaces
replicas. A restarted front resumes the bucket's jobs.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, ValidationError
from ray import serve
from ray.exceptions import RayError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.errors import LightReasonerError, fault_words, shown
from server import logs
from server.api.app import Service, create_app
from server.api.guard import Guard, load_keys
from server.api.serving import ENDING_SECONDS
from server.cluster.remote import RemotePair
from server.cluster.replica import PairReplica, StartPair, checked_and_started
from server.configuration import load_settings
from server.engines.pair import Pair
from server.logs import log
from server.memory import ranks_of, slots_a_rank
from server.settings import ROLES, EngineArguments, Role, ServerSettings, SettingsError

HOST = "0.0.0.0"
"""Assumed address of Ray's proxies, unless `host` is given: keys are required beyond loopback."""
BUSY_SHARE = 0.5
"""Share of a replica's slots in use at which Ray starts another replica. A job uses 0.75."""
HEALTH_SECONDS = 2.0
"""Interval of Ray's health checks. Ray ends a replica after three failed checks."""
FRONT_REQUESTS = 4096
"""Most open requests of one front. `limits` bound what they hold."""
DESCRIBE_SECONDS = 5.0
LOGGING = {"enable_access_log": False}
"""Turns off Ray's own log line for every trajectory; our log has what matters."""


def application(args: dict[str, Any]) -> serve.Application:
    """The application. `args`: `config`, any key of server.yaml, `min_replicas`, `max_replicas`, `gpus` per replica.

    Ray Serve calls it with `args` alone. Raises SettingsError.
    """
    return application_over(checked_and_started, args)


def application_over(start: StartPair, args: dict[str, Any]) -> serve.Application:
    """The application, with `start` to check and start the pair of each replica."""
    given = dict(args)
    count = ReplicaCount.of({name: given.pop(name) for name in ReplicaCount.model_fields if name in given})
    config = given.pop("config", None)
    settings, slots = _with_slots(load_settings(Path(config) if config else None, **{"host": HOST, **given}))
    load_keys(settings)  # reports a missing key before anything starts
    replicas = serve.deployment(PairReplica).options(  # type: ignore[attr-defined]
        name="Pair",
        ray_actor_options={"num_cpus": 1, "num_gpus": count.gpus},
        max_ongoing_requests=2 * slots,  # as many wait as run, so that no slot is ever empty
        autoscaling_config={
            "min_replicas": count.min_replicas,
            "max_replicas": count.most,
            "target_ongoing_requests": max(1, int(BUSY_SHARE * slots)),
        },
        health_check_period_s=HEALTH_SECONDS,
        logging_config=LOGGING,
        graceful_shutdown_timeout_s=settings.grace_seconds + ENDING_SECONDS,
    )
    front = serve.deployment(serve.ingress()(Front)).options(  # type: ignore[attr-defined]
        name="Front",
        ray_actor_options={"num_cpus": 0},  # else replicas could take all of Ray's CPUs, and no front could restart
        max_ongoing_requests=FRONT_REQUESTS,
        health_check_period_s=HEALTH_SECONDS,
        logging_config=LOGGING,
        graceful_shutdown_timeout_s=settings.grace_seconds + ENDING_SECONDS,
    )
    return front.bind(settings, replicas.bind(settings, start), count.most)


class ReplicaCount(BaseModel):
    """The number of replicas, and of GPUs for each."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, ge=1)
    gpus: float = Field(1, ge=0, allow_inf_nan=False)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Self:
        """Raises SettingsError."""
        try:
            count = cls(**given)
        except ValidationError as error:
            first = error.errors()[0]
            raise SettingsError(f"{first['loc'][0]} {shown(first['input'])}: {fault_words(first)}") from None
        if count.most < count.min_replicas:
            raise SettingsError(
                f"min_replicas {count.min_replicas} and max_replicas {count.most}: give the larger one last"
            )
        return count

    @property
    def most(self) -> int:
        return self.min_replicas if self.max_replicas is None else self.max_replicas


def _with_slots(settings: ServerSettings) -> tuple[ServerSettings, int]:
    """The settings with the number of sequences that each engine runs, and a replica's slots.

    Ray must know them before an engine has started; vLLM's own number differs between machines.
    """
    given: dict[Role, EngineArguments] = {role: settings.arguments(role) for role in ROLES}
    each = {role: slots_a_rank(role, given) for role in ROLES}
    slots = min(each[role] * ranks_of(given[role]) for role in ROLES)
    engines: dict[str, Any] = {
        role: given[role] | {"max_num_seqs": given[role].get("max_num_seqs") or each[role]} for role in ROLES
    }
    return settings.model_copy(update=engines), slots


class Front:
    """The service over HTTP, in front of all replicas."""

    def __init__(self, settings: ServerSettings, replicas: Any, most: int) -> None:
        logs.configure()
        self._settings, self._replicas, self._most = settings, replicas, most
        self._failed: BaseException | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        keys, limits = load_keys(self._settings), self._settings.limits
        app = create_app(self._settings, self._remote_pair, self._fail, max(1, len(keys.names)))
        service: Service = app.state.service
        self._service = service
        guarded = Guard(app, keys, limits.body_bytes, lambda: service.draining, limits.all_bodies_bytes)
        return Draining(guarded, service, self._settings.grace_seconds)

    def check_health(self) -> None:
        """Raises RuntimeError if the service could not start, or replicas serve another pair."""
        pair = self._service.pair
        if reason := self._failed or (pair and pair.failure()):
            raise RuntimeError(str(reason))

    def _fail(self, error: BaseException) -> None:
        self._failed = error

    def _remote_pair(self, stopping: threading.Event) -> Pair:
        """Wait for the first replica; returns the pair of all replicas."""
        while not stopping.is_set():
            try:
                described = self._replicas.describe.remote().result(timeout_s=DESCRIBE_SECONDS)
                return RemotePair(self._replicas, described, self._most)
            except (TimeoutError, RayError) as error:
                log.info("no replica is ready yet: %s", type(error).__name__)
                time.sleep(1.0)
        raise LightReasonerError("told to stop before a replica was ready")


class Draining:
    """An application that finishes its work and hands its job back before Ray Serve ends it."""

    def __init__(self, app: ASGIApp, service: Service, grace_seconds: float) -> None:
        self._app, self._service, self._grace = app, service, grace_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def received() -> Message:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                await self._service.drain(self._grace)
            return message

        await self._app(scope, received if scope["type"] == "lifespan" else receive, send)

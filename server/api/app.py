"""The HTTP service: its routes, and a pair that starts in the background.

In: `start_pair`, a blocking call that returns a `Pair` unless its event is set. The service is live at once, and ready
when both engines have run a warm-up. `server.engines.pair` computes every number in a response; nothing is computed
here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from client.protocol.lines import FailureLine, TrajectoryLine
from client.protocol.requests import ModelList, ProblemDetails, TrajectoryRequest
from server import metrics
from server.api.bodies import BodyRoute
from server.api.job_routes import job_routes
from server.api.problem_details import add_handlers, documented, invalid
from server.api.sharing import EngineSlots, caller_of
from server.api.streaming import NDJSON, RequestQueue, TrajectoryStream, UnreadLines
from server.engines.pair import Pair, Turn
from server.jobs.pair_source import installed_versions
from server.jobs.runner import JobRunner
from server.logs import log
from server.settings import ROLES, ServerSettings


class Service:
    """What the routes share: the pair, or the stage of its start; the queue of requests; the jobs."""

    def __init__(self, settings: ServerSettings, keys: int) -> None:
        self.jobs = JobRunner(settings.bucket, settings, installed_versions()) if settings.bucket else None
        self.pair: Pair | None = None
        self.stage = "starting the engines"
        self.draining = False
        self.keys = keys
        """The number of keys that share the service; 1 if it has none."""
        self.queue = RequestQueue(settings.limits.queued_trajectories, keys)
        self.slots: EngineSlots | None = None  # only if several keys share them
        self.unread = UnreadLines(settings.limits.unread_bytes)
        self.stopping = threading.Event()
        self._hang_seconds = settings.hang_seconds
        self._watching: asyncio.Task[None] | None = None

    async def start(self, start_pair: Callable[[threading.Event], Pair]) -> None:
        """Start and warm up the pair. The service is ready afterwards, unless it was told to stop."""
        pair = await asyncio.to_thread(start_pair, self.stopping)
        self.stage = "warming up"
        try:
            if not self.stopping.is_set():
                await pair.warm_up()
                self.pair = pair
                self.slots = EngineSlots(lambda: pair.expert.slots) if self.keys > 1 else None
                self._watching = asyncio.create_task(pair.watch(self._hang_seconds))
                cards = pair.card(pair.expert), pair.card(pair.amateur)
                log.info("ready: %s", ", ".join(f"{card.role} in {card.dtype}" for card in cards))
        finally:
            if self.pair is None:
                await asyncio.to_thread(pair.shutdown)

    async def drain(self, grace_seconds: float) -> None:
        """Accept nothing new. Return when all requests are answered and the job is handed back.

        After the grace period, unanswered trajectories get error lines.
        """
        self.draining = True
        log.info("stopping: %d trajectories are not sent yet", self.queue.depth)
        await asyncio.gather(*(part.drain(grace_seconds) for part in (self.queue, self.jobs) if part))

    async def stop(self, starting: asyncio.Task[None]) -> None:
        """Stop the engines. Waits for engines that are still starting: a thread cannot be cancelled."""
        self.stopping.set()
        with contextlib.suppress(Exception):
            await starting
        if self._watching:
            self._watching.cancel()
        if self.pair:
            await asyncio.to_thread(self.pair.shutdown)

    def ready_pair(self) -> Pair:
        """The pair. Answers 503 while it is not ready, has failed, or is stopping."""
        if self.pair is None or self.draining:
            stage = "stopping" if self.draining else self.stage
            raise HTTPException(503, f"not ready: {stage}", headers={"Retry-After": "5"})
        if reason := self.pair.failure():
            raise HTTPException(503, reason)
        return self.pair

    def measure(self) -> None:
        """Set the gauges from the current state."""
        dead = self.pair.dead() if self.pair else {}
        for role in ROLES:
            metrics.ENGINE_UP.labels(role).set(self.pair is not None and role not in dead)
        metrics.READY.set(self.pair is not None and not self.pair.failure() and not self.draining)


def create_app(
    settings: ServerSettings,
    start_pair: Callable[[threading.Event], Pair],
    on_failure: Callable[[BaseException], None],
    keys: int = 1,
) -> FastAPI:
    """The application; its service is `app.state.service`. Calls `on_failure` once if the pair cannot start.

    `keys`: the number of key names that share the application.
    """
    service = Service(settings, keys)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start(start_pair))
        watching = asyncio.create_task(metrics.watch_loop())

        def finished(task: asyncio.Task[None]) -> None:
            if not (task.cancelled() or service.draining or service.stopping.is_set()) and (error := task.exception()):
                service.stage = str(error)
                on_failure(error)
            elif service.jobs and service.pair:
                service.jobs.start(service.pair)

        starting.add_done_callback(finished)
        yield
        await service.stop(starting)
        watching.cancel()

    app = FastAPI(
        title="LightReasoner", version=installed_versions()["lightreasoner"], lifespan=lifespan, redirect_slashes=False
    )
    app.state.service = service
    add_handlers(app)
    for router in (routes, job_routes):
        app.include_router(router, responses=documented(401, 408, 413, 500))
    app.openapi = functools.partial(_openapi, app, app.openapi)  # type: ignore[method-assign]
    return app


def service_of(request: Request) -> Service:
    """The application's service."""
    return request.app.state.service


def ready_pair(request: Request) -> Pair:
    """The pair for a route. Answers 503 while there is none."""
    return service_of(request).ready_pair()


ReadyPair = Annotated[Pair, Depends(ready_pair)]
routes = APIRouter(route_class=BodyRoute)


class WholeFile(FileResponse):
    """A file that is sent whole, even if a range is requested: HTTP allows that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    status: Literal["ready"] = "ready"


LINE = {"oneOf": [{"$ref": f"#/components/schemas/{model.__name__}"} for model in (TrajectoryLine, FailureLine)]}


@routes.post(
    "/v1/trajectories",
    response_class=StreamingResponse,
    responses={
        200: {"content": {NDJSON: {"schema": LINE}}, "description": "A line per trajectory, as each completes."},
        **documented(400, 422, 429, 503),
    },
)
async def trajectories(request: Request, asked: TrajectoryRequest, pair: ReadyPair) -> StreamingResponse:
    """Sample trajectories for a list of problems. Both models score them; each line is sent when it is complete."""
    queue = service_of(request).queue
    if objection := pair.accepted.objection(asked):
        raise invalid(*objection)
    count = len(asked.problems) * asked.n
    if count > queue.most:
        raise invalid("problems", f"{count} trajectories in one request; this server takes at most {queue.most}")
    service, key_name = service_of(request), caller_of(request).key_name
    queue.enter(count, key_name)
    turn = Turn(slot=service.slots.of(key_name)) if service.slots else Turn()
    answer = functools.partial(pair.trajectory, sampling=asked, turn=turn)
    return TrajectoryStream(asked, answer, queue, service.unread, key_name)


@routes.get("/v1/models", responses=documented(503))
async def models(pair: ReadyPair) -> ModelList:
    """Both models, each with its role and fingerprints."""
    return ModelList(data=[pair.card(pair.expert), pair.card(pair.amateur)])


@routes.get("/v1/tokenizer", response_class=FileResponse, responses=documented(503))
async def tokenizer(pair: ReadyPair) -> FileResponse:
    """The expert's tokenizer.json."""
    return WholeFile(pair.facts.expert.folder / "tokenizer.json", media_type="application/json")


@routes.get("/health", responses=documented(503))
async def health(request: Request) -> Health:
    """Live: the process answers and no engine has died. Needs no key."""
    pair = service_of(request).pair
    if pair and (reason := pair.failure()):
        raise HTTPException(503, reason)
    return Health()


@routes.get("/ready", responses=documented(503))
async def ready(_: ReadyPair) -> Ready:
    """Ready: both engines have loaded and run a warm-up. Needs no key."""
    return Ready()


@routes.get(
    "/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
)
async def exposition(request: Request) -> Response:
    """Prometheus metrics: the service's own and both engines', by role."""
    service_of(request).measure()
    return Response(metrics.prometheus_text(), media_type=metrics.CONTENT_TYPE)


@routes.get("/version")
async def versions() -> dict[str, str]:
    """Versions of this service and of the packages that its results depend on."""
    return installed_versions()


def _openapi(app: FastAPI, generate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """FastAPI's OpenAPI document plus what FastAPI does not know: the lines of a stream, error documents, the key."""
    if app.openapi_schema is None:
        document = generate()
        _, shapes = models_json_schema(
            [(model, "serialization") for model in (TrajectoryLine, FailureLine, ProblemDetails)],
            ref_template="#/components/schemas/{model}",
        )
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(shapes["$defs"])
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]  # on loopback a server without keys needs none
        app.openapi_schema = document
    return app.openapi_schema

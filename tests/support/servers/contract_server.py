"""A real HTTP server that follows the contract and answers from memory: made-up models, trajectories of `made_run`.

It is for tests of the client alone: what the client does when a server refuses, stops or dies. It runs in a thread of
the test's process, or, if a test kills it, in its own process (`python -m support.servers.contract_server PORT`). A
question that contains "unanswerable" gets an error line. A test sets everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from client.protocol.requests import DEFAULT_TOP_K, Failure, ModelList
from support.runs.made_run import make_manifest, make_trajectory, tokenizer_json
from support.servers.real_server import free_port

TOKENS = 4


def line_of(problem: dict[str, Any], index: int) -> bytes:
    """The line that answers a problem: always the same for a problem and an index."""
    if "unanswerable" in (problem["question"] or ""):
        return Failure(problem["id"], index, "context_length_exceeded", "the problem is too long").to_line()
    seed = zlib.crc32(f"{problem['id']}/{index}".encode())
    made = make_trajectory(problem["id"], seed, TOKENS, problem.get("top_k", DEFAULT_TOP_K))
    return dataclasses.replace(made, sample_index=index).to_line("base64")


def refusal(status: int, detail: str, **headers: str) -> Response:
    """A refusal in the service's format."""
    return JSONResponse({"detail": detail}, status, {name.replace("_", "-"): value for name, value in headers.items()})


class ContractServer:
    """The server, with everything that a test can set and look at."""

    def __init__(self, port: int | None = None, host: str = "127.0.0.1", **cards: Any) -> None:
        manifest = make_manifest()
        self.pair = [card.model_copy(update=cards) for card in (manifest.expert, manifest.amateur)]
        self.port = port or free_port()
        self.host, self.url = host, f"http://{host}:{self.port}"
        self.asked: list[list[str]] = []  # the problems' ids of each request that was not refused
        self.requests: list[Request] = []
        self.refuse: Callable[[Request], Response | None] = lambda request: None
        self.line: Callable[[dict[str, Any], int], bytes] = line_of
        self.before_line: Callable[[], Any] | None = None  # awaited before each line
        self.after_lines: Callable[[], Any] | None = None  # awaited when the last line of a request is on its way

    async def _models(self, request: Request) -> Response:
        return Response(ModelList(data=self.pair).model_dump_json(), media_type="application/json")

    async def _trajectories(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        self.asked.append([problem["id"] for problem in body["problems"]])

        async def lines() -> AsyncIterator[bytes]:
            for problem in body["problems"]:
                problem["top_k"] = body["top_k"]  # the line depends on it
                for index in range(body["n"]):
                    if wait := self.before_line:  # a test may change it at any moment
                        await wait()
                    yield self.line(problem, index)
            if self.after_lines:
                await self.after_lines()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    def _guarded(self, answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def guarded(request: Request) -> Response:
            self.requests.append(request)
            return self.refuse(request) or await answer(request)

        return guarded

    @property
    def app(self) -> Starlette:
        async def ready(request: Request) -> Response:
            return JSONResponse({"status": "ready"})

        async def version(request: Request) -> Response:
            return JSONResponse({"lightreasoner": "1"})

        async def tokenizer(request: Request) -> Response:
            return Response(tokenizer_json())

        gets = {"/ready": ready, "/version": version, "/v1/models": self._models, "/v1/tokenizer": tokenizer}
        routes = [Route(path, self._guarded(answer)) for path, answer in gets.items()]
        return Starlette(
            routes=[*routes, Route("/v1/trajectories", self._guarded(self._trajectories), methods=["POST"])]
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[ContractServer]:
        """Serve from a thread until the end of the block, at the same port each time."""
        with serving(self.app, socket.create_server((self.host, self.port))):
            yield self


@contextlib.contextmanager
def serving(app: Callable[..., Any], listener: socket.socket) -> Iterator[None]:
    """Serve an application from a thread until the end of the block."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listener.close()


if __name__ == "__main__":
    uvicorn.run(ContractServer().app, port=int(sys.argv[1]), log_level="warning")

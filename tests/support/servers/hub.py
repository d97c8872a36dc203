"""A stand-in for the Hugging Face Hub: its HTTP API for data sets, from memory, over real HTTP.

It answers the requests of huggingface_hub that create a data set, commit to it, list it and read it. Parquet files go
through a store, as on the Hub, whole or in pieces (`piece_bytes`). Xet, the Hub's own store of chunks, is not here.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
from collections.abc import Iterator
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from support.servers.contract_server import serving

TOKEN = "hf_of_the_stand_in"


class Hub:
    """The stand-in: the data sets that it holds, and the commits that it got."""

    def __init__(self) -> None:
        self.data_sets: dict[str, list[dict[str, bytes]]] = {}  # by name: the files of each commit
        self.private: set[str] = set()
        self.refuse: int | None = None  # status with which every commit is refused
        self.refuse_upload: int | None = None  # status with which every upload to the store is refused
        self.piece_bytes: int | None = None
        self.stored: dict[str, bytes] = {}  # by SHA-256
        self._pieces: dict[str, dict[int, bytes]] = {}
        self.commits: list[list[str]] = []  # the files that each commit added
        self.url = ""

    def files(self, name: str, revision: str = "main") -> dict[str, bytes] | None:
        """The files of a revision: main, or the number of a commit as its hash."""
        commits = self.data_sets.get(name, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((files for number, files in enumerate(commits) if _sha(number) == revision), None)

    async def _create(self, request: Request) -> Response:
        body = await request.json()
        name = f"{body.get('organization') or 'me'}/{body['name']}"
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return JSONResponse({"error": "Invalid username or password."}, 401)
        if name in self.data_sets:
            return JSONResponse({"error": "You already created this dataset repo", "url": self._of(name)}, 409)
        self.data_sets[name] = [{}]
        if body.get("private") or body.get("visibility") == "private":
            self.private.add(name)
        return JSONResponse({"url": self._of(name), "name": name})

    def _of(self, name: str) -> str:
        return f"{self.url}/datasets/{name}"

    async def _info(self, request: Request) -> Response:
        name, revision = self._asked(request)
        if (files := self.files(name, revision)) is None:
            return self._missing(name)
        number = next(index for index, commit in enumerate(self.data_sets[name]) if commit is files)
        siblings = [{"rfilename": path} for path in files]
        return JSONResponse({"id": name, "sha": _sha(number), "private": False, "tags": [], "siblings": siblings})

    async def _tree(self, request: Request) -> Response:
        name, revision = self._asked(request)
        if (files := self.files(name, revision)) is None:
            return self._missing(name)
        folder, found = request.path_params.get("path", ""), {}
        begin = f"{folder}/" if folder else ""
        for path, data in files.items():
            inner, _, below = path.removeprefix(begin).partition("/")
            if path.startswith(begin) and below and request.query_params.get("recursive", "").lower() != "true":
                found[begin + inner] = {"type": "directory", "path": begin + inner, "oid": "0", "size": 0}
            elif path.startswith(begin):
                found[path] = _entry(path, data)
        return JSONResponse(list(found.values())) if found or not folder else self._missing(name, "EntryNotFound")

    async def _paths(self, request: Request) -> Response:
        name, revision = self._asked(request)
        if (files := self.files(name, revision)) is None:
            return self._missing(name)
        wanted = (await request.form()).getlist("paths") if b"=" in await request.body() else []
        wanted = wanted or orjson.loads(await request.body())["paths"]
        found: list[Any] = [_entry(path, files[path]) for path in wanted if path in files]
        found += [
            {"type": "directory", "path": path, "oid": "0"}
            for path in wanted
            if any(one.startswith(f"{path}/") for one in files)
        ]
        return JSONResponse(found)

    async def _file(self, request: Request) -> Response:
        name, revision = self._asked(request)
        path = request.path_params["path"]
        if (files := self.files(name, revision)) is None:
            return self._missing(name)
        if path not in files:
            return self._missing(name, "EntryNotFound")
        data, headers = files[path], {"etag": f'"{_oid(files[path])}"', "x-repo-commit": revision}
        if (asked := request.headers.get("range", "").removeprefix("bytes=")) and request.method == "GET":
            first, _, last = asked.partition("-")
            until = min(int(last or len(data)), len(data) - 1)
            headers["content-range"] = f"bytes {first}-{until}/{len(data)}"
            return Response(data[int(first) : until + 1], 206, headers)
        return Response(data, headers=headers)

    async def _modes(self, request: Request) -> Response:
        files = (await request.json())["files"]
        return JSONResponse(
            {
                "files": [
                    {"path": (path := file["path"]), "shouldIgnore": False,
                     "uploadMode": "lfs" if path.endswith(".parquet") else "regular"}
                    for file in files
                ]
            }
        )  # fmt: skip

    async def _batch(self, request: Request) -> Response:
        objects = []
        for asked in (await request.json())["objects"]:
            action: dict[str, Any] = {"href": f"{self.url}/store/{asked['oid']}"}
            if size := self.piece_bytes:
                numbers = range(1, -(-asked["size"] // size) + 1)
                pieces = {f"{number:05d}": f"{action['href']}/{number}" for number in numbers}
                action["header"] = {"chunk_size": str(size), **pieces}
            objects.append({**asked, "actions": {"upload": action}})
        return JSONResponse({"transfer": "multipart" if self.piece_bytes else "basic", "objects": objects})

    async def _store(self, request: Request) -> Response:
        oid, data = request.path_params["oid"], await request.body()
        if self.refuse_upload:
            return Response("no", self.refuse_upload)
        if request.method == "POST":  # completes an upload in pieces
            pieces = self._pieces.pop(oid)
            data = b"".join(pieces[part["partNumber"]] for part in orjson.loads(data)["parts"])
        elif number := request.path_params.get("number"):
            self._pieces.setdefault(oid, {})[number] = data
            return Response(headers={"etag": f'"{number}"'})
        assert hashlib.sha256(data).hexdigest() == oid
        self.stored[oid] = data
        return JSONResponse({"success": True})

    async def _commit(self, request: Request) -> Response:
        name, _ = self._asked(request)
        if self.refuse:
            return JSONResponse({"error": "no more room"}, self.refuse)
        lines = [orjson.loads(line) for line in (await request.body()).splitlines() if line]
        added = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
        by_store = {line["value"]["path"]: line["value"]["oid"] for line in lines if line["key"] == "lfsFile"}
        files = self.data_sets[name][-1] | {path: base64.b64decode(data) for path, data in added.items()}
        self.data_sets[name].append(files | {path: self.stored[oid] for path, oid in by_store.items()})
        self.commits.append(sorted(added | by_store))
        sha = _sha(len(self.data_sets[name]) - 1)
        return JSONResponse({"success": True, "commitOid": sha, "commitUrl": f"{self._of(name)}/commit/{sha}"})

    async def _valid(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    def _asked(self, request: Request) -> tuple[str, str]:
        of = request.path_params
        return f"{of['owner']}/{of['name']}", of.get("revision", "main")

    def _missing(self, name: str, what: str = "RepoNotFound") -> Response:
        return JSONResponse({"error": f"{name} not found"}, 404, {"x-error-code": what, "x-error-message": "not found"})

    @property
    def app(self) -> Starlette:
        api, post = "/api/datasets/{owner}/{name}", ["POST"]
        return Starlette(
            routes=[
                Route("/api/repos/create", self._create, methods=post),
                Route("/datasets/{owner}/{name}.git/info/lfs/objects/batch", self._batch, methods=post),
                Route("/store/{oid}", self._store, methods=["PUT", "POST"]),
                Route("/store/{oid}/{number:int}", self._store, methods=["PUT"]),
                Route("/api/validate-yaml", self._valid, methods=post),
                Route(f"{api}/preupload/{{revision}}", self._modes, methods=post),
                Route(f"{api}/commit/{{revision}}", self._commit, methods=post),
                Route(f"{api}/paths-info/{{revision}}", self._paths, methods=post),
                Route(f"{api}/tree/{{revision}}", self._tree),
                Route(f"{api}/tree/{{revision}}/{{path:path}}", self._tree),
                Route(f"{api}/revision/{{revision}}", self._info),
                Route(api, self._info),
                Route("/datasets/{owner}/{name}/resolve/{revision}/{path:path}", self._file, methods=["GET", "HEAD"]),
            ]
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        """Serve from a thread until the end of the block."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with serving(self.app, listener):
            yield self


def _sha(number: int) -> str:
    """The hash of a commit by its number."""
    return f"{number:040x}"


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _oid(data)}

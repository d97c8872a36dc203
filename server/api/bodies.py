"""Parses a request's JSON body into the contract's model, piece by piece: no body blocks the event loop.

In: bytes of at most `limits.body_bytes`. Out: the model, or RequestValidationError with the invalid fields. A large
body is parsed in a thread, and no step there holds the interpreter for long: the body is split into its fields and its
problems without parsing them, and parsing ends at the first part that does not belong. Checks only the form: the routes
check what a pair accepts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from msgspec import UNSET, Raw, UnsetType
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from client.errors import shorten
from client.protocol.requests import LARGEST_ID, MAX_IDS, MAX_SHARED_CHARACTERS, Problem

INLINE_BYTES = 64 * 1024
"""Most bytes of a body that is parsed in the event loop: it takes some milliseconds."""
SETTINGS_BYTES = 20 * MAX_SHARED_CHARACTERS
"""Most bytes of a body beside its problems, however they are escaped."""
MOST_STRINGS = 1_000_000
"""Most names and strings of a body: they bound the number of pieces."""
TOKEN_FIELDS = frozenset({"prompt_token_ids", "token_ids"})
"""Fields of a problem that hold token ids."""
JSON_TYPE = re.compile(r"application/(.+\+)?json")
"""Other content types are rejected: a web page may send them to a server on its reader's machine without permission."""
ERROR_PLACE = re.compile(r" - at `\$(.*)`$")
FIELD_ERRORS = {"Object contains unknown field": "Extra inputs are not permitted",
                "Object missing required field": "Field required"}  # fmt: skip
"""Errors of msgspec that name a field, in pydantic's words."""

_id_lists = msgspec.json.Decoder(list[int])
_settings = msgspec.json.Decoder()


class MessagePieces(msgspec.Struct, forbid_unknown_fields=True):
    """A message, as it is parsed."""

    role: str
    content: str


ProblemPieces = msgspec.defstruct(
    "ProblemPieces",
    [(name, Raw) if field.is_required() else (name, Raw | UnsetType, UNSET)
     for name, field in Problem.model_fields.items()],
    forbid_unknown_fields=True,
)  # fmt: skip
"""A problem whose fields are split, but not parsed yet."""
_problem_pieces = msgspec.json.Decoder(list[ProblemPieces])  # type: ignore[valid-type]
_message_pieces = msgspec.json.Decoder(list[MessagePieces])


class BodyFault(Exception):
    """A field of the body, by its path, and what is wrong with it."""

    def __init__(self, path: tuple[str | int, ...], reason: str) -> None:
        super().__init__(reason)
        self.path = path


class BodyReader:
    """Parses bodies into one model."""

    def __init__(self, model: type[BaseModel]) -> None:
        fields = [(name, Raw | UnsetType, UNSET) for name in model.model_fields]
        pieces = msgspec.defstruct(f"{model.__name__}Pieces", fields, forbid_unknown_fields=True)
        self._model, self._fields = model, msgspec.json.Decoder(pieces)

    def read(self, body: bytes) -> BaseModel:
        """Parse a body into the model. Raises RequestValidationError."""
        try:
            return self._read(body)
        except BodyFault as error:
            where, said = error.path, str(error)
        except msgspec.ValidationError as error:  # valid JSON, of another form
            where, said = _place(str(error))
        except RecursionError:
            where, said = (), "nested too deeply"
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            where, said = (), f"not valid JSON: {error}"
        except ValidationError as error:
            raise RequestValidationError(
                [{**entry, "loc": ("body", *entry["loc"])} for entry in error.errors(include_url=False)]
            ) from None
        raise RequestValidationError([{"loc": ("body", *where), "msg": said, "type": "value_error"}])

    def _read(self, body: bytes) -> BaseModel:
        if (strings := (body.count(b'"') - body.count(b'\\"')) // 2) > MOST_STRINGS:
            raise BodyFault((), f"{strings:,} names and texts; at most {MOST_STRINGS:,} are allowed")
        pieces = {
            name: cast(Raw, piece)
            for name, piece in msgspec.structs.asdict(self._fields.decode(body)).items()
            if piece is not UNSET
        }
        problems = pieces.pop("problems", None)
        if (size := sum(len(bytes(piece)) for piece in pieces.values())) > SETTINGS_BYTES:
            raise BodyFault((), f"{size:,} bytes beside the problems; at most {SETTINGS_BYTES:,} are allowed")
        values = {name: _items((name,), piece, _settings) for name, piece in pieces.items()}
        if problems is not None:
            values["problems"] = self._problem_list(problems)
        return self._model.model_validate(values)

    @staticmethod
    def _problem_list(pieces: Raw) -> list[Problem] | None:
        if bytes(memoryview(pieces)[:4]) == b"null":
            return None
        found = _items(("problems",), pieces, _problem_pieces)
        return [_problem_of(index, piece) for index, piece in enumerate(found)]


def _problem_of(index: int, pieces: msgspec.Struct) -> Problem:
    """Make a problem. Token ids are checked as they are parsed; pydantic sees only the first of them."""
    values: dict[str, Any] = {}
    ids: dict[str, list[int]] = {}
    for name, piece in msgspec.structs.asdict(pieces).items():
        if piece is UNSET:
            continue
        path, first = ("problems", index, name), chr(memoryview(piece)[0])
        if first == "n":
            values[name] = None
        elif name not in TOKEN_FIELDS and name != "messages":
            if first != '"':
                raise BodyFault(path, "expected a string")
            values[name] = _items(path, piece, _settings)
        elif first != "[":
            raise BodyFault(path, "expected a list")
        elif name in TOKEN_FIELDS:
            ids[name] = _token_ids(path, piece)
            values[name] = ids[name][:1]
        else:
            values[name] = [msgspec.structs.asdict(message) for message in _items(path, piece, _message_pieces)]
    try:
        return Problem.model_validate(values).model_copy(update=ids)
    except ValidationError as error:
        raise ValidationError.from_exception_data(
            error.title,
            [
                {"type": entry["type"], "loc": ("problems", index, *entry["loc"]), "input": None,
                 "ctx": entry.get("ctx", {})}
                for entry in error.errors(include_url=False, include_input=False)
            ],
        ) from None  # fmt: skip


def _items(path: tuple[str | int, ...], piece: Raw, decoder: msgspec.json.Decoder) -> Any:
    try:
        return decoder.decode(piece)
    except msgspec.ValidationError as error:
        inner, reason = _place(str(error))
        raise BodyFault((*path, *inner), reason) from None


def _token_ids(path: tuple[str | int, ...], piece: Raw) -> list[int]:
    if (count := bytes(piece).count(b",") + 1) > MAX_IDS:
        raise BodyFault(path, f"{count:,} items; a list should have at most {MAX_IDS:,}")
    ids = _items(path, piece, _id_lists)
    if ids and not (min(ids) >= 0 and max(ids) <= LARGEST_ID):
        index = next(index for index, token in enumerate(ids) if not 0 <= token <= LARGEST_ID)
        raise BodyFault((*path, index), f"expected a number from 0 to {LARGEST_ID}")
    return ids


def _place(said: str) -> tuple[tuple[str | int, ...], str]:
    """The path and the reason in an error of msgspec: '… - at `$[3].question`'."""
    path: list[str | int] = []
    if place := ERROR_PLACE.search(said):
        for index, name in re.findall(r"\[(\d+)\]|\.([^.\[\]]+)", place[1]):  # [...]: somewhere in an object
            path.append(int(index) if index else name)
    reason = ERROR_PLACE.sub("", said)
    for start, known in FIELD_ERRORS.items():
        if field := re.fullmatch(f"{start} `(.*)`", reason):
            return (*path, field[1]), known
    return tuple(path), reason


class ModelRequest(Request):
    """A request whose `json` returns the route's model; FastAPI uses it unchanged."""

    def __init__(self, request: Request, reader: BodyReader) -> None:
        super().__init__(request.scope, request.receive)
        self._reader = reader
        self.fault: RequestValidationError | None = None

    async def json(self) -> Any:
        body = await self.body()
        self._body = b""  # the model holds all of it
        try:
            if len(body) <= INLINE_BYTES:
                return self._reader.read(body)
            return await asyncio.get_running_loop().run_in_executor(_thread, self._reader.read, body)
        except RequestValidationError as fault:
            self.fault = fault
            raise


_thread = ThreadPoolExecutor(1, "bodies")


class BodyRoute(APIRoute):
    """A route whose body this module parses."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle
        reader = BodyReader(self.body_field.field_info.annotation)  # type: ignore[arg-type]

        async def read(request: Request) -> Response:
            asked = ModelRequest(request, reader)
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if not JSON_TYPE.fullmatch(kind) and await asked.body():
                said = f"it is {shorten(kind) or 'not given'}; send Content-Type: application/json"
                raise RequestValidationError([{"loc": ("header", "content-type"), "msg": said, "type": "value_error"}])
            try:
                return await handle(asked)
            except HTTPException:
                if asked.fault:  # FastAPI has made a 400 of it
                    raise asked.fault from None
                raise

        return read

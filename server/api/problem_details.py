"""Request errors as RFC 9457 documents, and how the routes' documentation lists them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from client.errors import fault_words
from client.protocol.requests import ProblemDetails

MEDIA_TYPE = "application/problem+json"
Responses = dict[int | str, dict[str, Any]]
MOST_ERRORS = 20
"""The most errors that one response lists."""
MOST_FIELD_CHARACTERS = 200
"""The longest field name in a response: the name comes from outside."""


def documented(*statuses: int) -> Responses:
    """The error responses of a route, for its documentation."""
    schema = {"schema": {"$ref": f"#/components/schemas/{ProblemDetails.__name__}"}}
    return {status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: schema}} for status in statuses}


def problem_response(
    status: int, detail: str, headers: dict[str, str] | None = None, errors: list[dict[str, str]] | None = None
) -> JSONResponse:
    """The response to a rejected request."""
    body = ProblemDetails(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors or [])
    return JSONResponse(body.model_dump(), status, headers, media_type=MEDIA_TYPE)


def invalid(field: str, message: str, where: str = "body") -> RequestValidationError:
    """An error of one field that no schema can check; `where` is body, query or header."""
    return RequestValidationError([{"loc": (where, field), "msg": message, "type": "value_error"}])


def add_handlers(app: FastAPI) -> None:
    """Make every error of this application a problem document."""

    @app.exception_handler(RequestValidationError)
    async def invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
        said = error.errors()[:MOST_ERRORS]
        errors = [{"field": _field(entry["loc"]), "detail": fault_words(entry)} for entry in said]
        detail = "; ".join(f"{entry['field']}: {entry['detail']}" for entry in errors[:5])
        return problem_response(422, detail, errors=errors)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return problem_response(500, f"internal error: {type(error).__name__}; see the server's log")


def _field(location: tuple[Any, ...] | list[Any]) -> str:
    """'problems[0].question' from pydantic's ('body', 'problems', 0, 'question')."""
    path = ""
    for part in location[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path[:MOST_FIELD_CHARACTERS] or str(location[0])

"""Errors in the shape that OpenAI clients know: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from eff_serve.api.schema.common import ErrorBody, ErrorResponse
from eff_serve.engine.types import DrainingError, QueueFullError

log = logging.getLogger("eff_serve")


class ApiError(HTTPException):
    """An error with everything that the client gets to see.

    Args:
        status: HTTP status.
        message: What was wrong, the value seen and the value wanted.
        param: The field at fault, as ``messages[0].content``.
        code: Stable word for programs.
        kind: OpenAI's ``type`` of error.
        headers: Response headers, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = ErrorBody(message=message, type=kind, param=param, code=code)

    def response(self) -> JSONResponse:
        """The response that says so."""
        content = ErrorResponse(error=self.body).model_dump()
        return JSONResponse(content, self.status_code, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request itself is at fault."""
    return ApiError(400, message, param=param, code=code)


def retry_later(status: int, message: str, code: str, seconds: float) -> ApiError:
    """429 or 503 with the time after which it makes sense to try again."""
    kind = "rate_limit_error" if status == 429 else "service_unavailable_error"
    return ApiError(status, message, code=code, kind=kind, headers={"retry-after": str(max(1, math.ceil(seconds)))})


def queue_full(error: QueueFullError) -> ApiError:
    """429 for a full waiting line."""
    return retry_later(429, str(error), "queue_full", error.retry_after)


def draining(error: DrainingError) -> ApiError:
    """503 while the server shuts down."""
    return retry_later(503, str(error) or "the server is shutting down", "draining", 5)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of the app in the one shape."""

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response()
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors(), error.body).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return internal_error().response()


def internal_error(message: str = "the server failed on this request; its log says more") -> ApiError:
    """500, without details of the inside."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def from_validation(errors: Any, body: Any) -> ApiError:
    """400 from pydantic's list of errors: the most specific one, with its field spelt as a path.

    A union reports an error for each of its branches; the deepest path belongs to the branch that fits best. Our own
    refusals (type ``refused``) come first, for they say most.
    """
    ranked = [(error["type"] == "refused", len(_path(error, body)), error) for error in errors]
    best = max(ranked, key=lambda r: r[:2])[2]
    param = _spell(_path(best, body)) or None
    if best["type"] == "extra_forbidden":
        return bad_request(
            f"unknown field {param!r}; fields that would have no effect are refused", param, "unknown_field"
        )
    message = best["msg"].removeprefix("Value error, ")
    if best["type"] != "refused":
        message = f"{param or 'body'}: {message}{_seen(best)}"
    return bad_request(message, param, "missing_field" if best["type"] == "missing" else "invalid_value")


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The error's location without pydantic's names of union branches, which lead to nothing in the body."""
    path: list[str | int] = []
    here = body
    location = [part for part in error["loc"] if part not in ("body", "query", "path")]
    for i, part in enumerate(location):
        if isinstance(here, dict) and isinstance(part, str) and part in here:  # noqa: SIM114 - mypy narrows each
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif not (error["type"] == "missing" and i == len(location) - 1):
            continue
        path.append(part)
    param = error.get("ctx", {}).get("param") if error["type"] == "refused" else ""
    return [*path, param] if param else path


def _spell(path: list[str | int]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")[:200]


def _seen(error: Mapping[str, Any]) -> str:
    value = error.get("input")
    if error["type"] == "missing" or not isinstance(value, str | int | float | bool):
        return ""
    text = repr(value)
    return f" (got {text if len(text) <= 60 else text[:57] + '...'})"

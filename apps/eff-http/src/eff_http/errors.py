"""Errors in the shape that OpenAI clients know: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from eff_http.schema import ErrorBody, ErrorResponse


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


def internal_error(message: str = "the server failed on this request; its log says more") -> ApiError:
    """500, without details of the inside; the connection is closed, since nobody knows what state it is in."""
    return ApiError(500, message, kind="server_error", code="internal_error", headers={"connection": "close"})

"""Reading request bodies strictly: bounded size and depth, and nothing that JSON does not have."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from eff_http.errors import ApiError, bad_request

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_DIGITS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BodyLimits:
    """Limits of request bodies; an app keeps its own in ``app.state.limits``.

    Attributes:
        max_bytes: Longest body.
        max_seconds: Time within which a body must arrive.
        max_depth: Deepest nesting.
    """

    max_bytes: int = 4 * 2**20
    max_seconds: float = 30.0
    max_depth: int = 64

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_seconds", "max_depth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")


def parse_json(body: bytes, max_depth: int) -> Any:
    """Parse a request body.

    Raises:
        ApiError: 400 for anything but UTF-8 JSON of at most ``max_depth`` levels with finite numbers, whole characters
            and no field given twice.
    """
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: {error.reason} at byte {error.start}", code="invalid_json") from None
    depth = nesting(text, max_depth)
    if depth > max_depth:
        raise bad_request(f"the body is nested more than {max_depth} levels deep", code="invalid_json")
    try:
        value = json.loads(
            text, parse_int=_int, parse_float=_float, parse_constant=_constant, object_pairs_hook=_object
        )
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise bad_request(f"the body is not JSON: {error.msg} at {where}", code="invalid_json") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise bad_request(
                "the body holds half a surrogate pair (\\ud800 to \\udfff alone)", code="invalid_json"
            ) from None
    return value


def nesting(text: str, enough: int) -> int:
    """Depth of the brackets outside strings; counting ends above ``enough``."""
    depth = deepest = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
        if depth > enough:
            break
    return deepest


def _int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise bad_request(f"the body holds a number of {len(text)} digits", code="invalid_json")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise bad_request(f"the body holds a number out of range: {text[:30]}", code="invalid_json")
    return value


def _constant(text: str) -> Any:
    raise bad_request(f"the body holds {text}, which JSON does not have", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise bad_request(f"the field {twice[:60]!r} is given twice", twice[:200], "invalid_json")
    return result


async def read_body(request: Request, max_bytes: int, max_seconds: float) -> bytes:
    """The body of a request, whatever it holds.

    Raises:
        ApiError: 413 if it is longer than ``max_bytes``, 408 if it was not complete after ``max_seconds``.
    """
    too_large = ApiError(
        413,
        f"the body is longer than {max_bytes} bytes",
        code="body_too_large",
        headers={"connection": "close"},
    )
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(max_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        message = f"the body was not complete after {max_seconds:g} s"
        raise ApiError(408, message, code="body_timeout", headers={"connection": "close"}) from None
    return b"".join(chunks)


class _StrictRequest(Request):
    """A request whose body is read within limits."""

    limits: BodyLimits

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            self._body = await self._read()
        return self._body

    async def _read(self) -> bytes:
        data = await read_body(self, self.limits.max_bytes, self.limits.max_seconds)
        kind = self.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            raise bad_request(f"content-type is {kind[:60]!r}; send application/json", code="invalid_content_type")
        return data

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body(), self.limits.max_depth)
        return self._json


class JsonRoute(APIRoute):
    """A route that reads its body by the rules of this module; the limits are ``app.state.limits``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler so that it sees the strict request."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            strict_request = _StrictRequest(request.scope, request.receive)
            strict_request.limits = request.app.state.limits
            return await handle(strict_request)

        return strict

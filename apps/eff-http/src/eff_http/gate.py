"""What stands before every request: the clock, the host it names, a key, and the count of the response."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eff_http.errors import ApiError

METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")  # clients may invent more; metrics may not
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class GateRules:
    """Who may come in.

    Attributes:
        api_keys: Keys that clients may use; empty means that no key is asked for.
        open_paths: Paths that need no key; one that ends with ``/`` stands for all below it.
        hosts: Names that a request's Host header may have, without port; None takes any. A server on the loopback
            address that asks for no key is open to every page in the user's browser unless it checks this (DNS
            rebinding).
    """

    api_keys: tuple[str, ...] = ()
    open_paths: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ValueError("API keys must be ASCII text without spaces around it, and not empty")


class Gate:
    """ASGI middleware: stamps ``state["arrival"]`` (perf_counter seconds), checks host and key, counts responses.

    Args:
        app: What lies behind.
        rules: Who may come in.
        count: Called with method, path of the route (not of the request, so that there are few) and status.
    """

    def __init__(self, app: ASGIApp, rules: GateRules, count: Callable[[str, str, int], None]) -> None:
        self._app, self._rules, self._count = app, rules, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["arrival"] = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-content-type-options"] = "nosniff"
                path = getattr(scope.get("route"), "path", "unknown")
                self._count(scope["method"] if scope["method"] in METHODS else "other", path, message["status"])
            await send(message)

        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = host_name(headers.get("host", ""))
        if self._rules.hosts is not None and host not in self._rules.hosts:
            seen = f"the Host header names {host[:100]!r}; this server answers to {', '.join(self._rules.hosts)}"
            return ApiError(421, seen, code="wrong_host")
        if not self._rules.api_keys or self._is_open(scope["path"]):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = ""
        # Compare with every key, each in constant time, so that timing tells nothing.
        matches = [secrets.compare_digest(given.strip().encode(), key.encode()) for key in self._rules.api_keys]
        if any(matches):
            return None
        message = "no API key, or a wrong one; send Authorization: Bearer <key>"
        return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    def _is_open(self, path: str) -> bool:
        return any(path == p or (p.endswith("/") and p != "/" and path.startswith(p)) for p in self._rules.open_paths)


def host_name(header: str) -> str:
    """The name in a Host header, lower case, without port and without the brackets of IPv6."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]

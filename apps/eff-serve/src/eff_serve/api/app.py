"""The app: routes, keys, the clock and counter of every request."""

from __future__ import annotations

import secrets
import time
from importlib import metadata

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eff_serve.api import chat, completions, page, system, tokens
from eff_serve.api.errors import ApiError, add_error_handlers
from eff_serve.api.serving import Serving
from eff_serve.api.settings import Settings
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.engine.types import Engine

_OPEN = ("/health", "/version", "/openapi.json")
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")  # clients may invent more; metrics may not


def create_app(engine: Engine | None, tokenizer: Tokenizer | None, settings: Settings) -> FastAPI:
    """Make the HTTP app of a model.

    Args:
        engine: Started engine; None while it loads (`Serving.ready` hands it in later, as ``app.state.serving``).
        tokenizer: The model's tokenizer, or None like the engine.
        settings: Names, keys, limits.
    """
    app = FastAPI(title="eff-serve", version=metadata.version("eff-serve"), docs_url=None, redoc_url=None)
    app.state.serving = Serving(engine, tokenizer, settings)
    for module in (chat, completions, system, tokens):
        app.include_router(module.router)
    if settings.chat_page:
        page.add_chat_page(app)
    add_error_handlers(app)
    app.add_middleware(_Gate)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


class _Gate:
    """Stamps the arrival of each request, asks for a key, and counts the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["arrival"] = time.perf_counter()
        serving: Serving = scope["app"].state.serving

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-content-type-options"] = "nosniff"
                route = scope.get("route")
                path = getattr(route, "path", "unknown")
                method = scope["method"] if scope["method"] in _METHODS else "other"
                serving.metrics.responded(method, path, message["status"])
            await send(message)

        if not _allowed(scope, serving.settings):
            message = "no API key, or a wrong one; send Authorization: Bearer <key>"
            error = ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            await error.response()(scope, receive, counted)
            return
        await self._app(scope, receive, counted)


def _allowed(scope: Scope, settings: Settings) -> bool:
    path = scope["path"]
    if not settings.api_keys or path in _OPEN or (path == "/metrics" and not settings.protect_metrics):
        return True
    if path == "/" or path.startswith("/static/"):
        return True  # the chat page itself holds nothing secret; it sends the key with each of its calls
    given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ").encode()
    # Compare with every key, each in constant time, so that timing tells nothing.
    matches = [secrets.compare_digest(given, key.encode()) for key in settings.api_keys]
    return any(matches)

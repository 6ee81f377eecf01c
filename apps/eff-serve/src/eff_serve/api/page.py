"""The chat page at ``/``: three static files under a policy that lets them load and call nothing but this server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

_FILES = {"/": "index.html", "/static/chat.css": "chat.css", "/static/chat.js": "chat.js"}
_FOLDER = Path(__file__).parents[1] / "web" / "static"
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_chat_page(app: FastAPI) -> None:
    """Add the routes of the page and its files."""
    for path, name in _FILES.items():
        app.add_api_route(path, _sender(name), include_in_schema=False, methods=["GET", "HEAD"])


def _sender(name: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(_FOLDER / name, headers=_HEADERS)

    return send

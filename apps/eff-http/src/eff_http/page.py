"""A page of static files, under a policy that lets it load and call nothing but its own server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "cache-control": "no-cache"}


def add_static_page(app: FastAPI, folder: Path, files: Mapping[str, str]) -> None:
    """Add a route for each file of a page: ``files`` maps paths of URLs to names inside ``folder``."""
    for path, name in files.items():
        app.add_api_route(path, _sender(folder / name), include_in_schema=False, methods=["GET", "HEAD"])


def _sender(path: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(path, headers=HEADERS)

    return send

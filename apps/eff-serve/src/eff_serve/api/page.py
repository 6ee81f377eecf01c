"""The chat page at ``/``: a few static files."""

from __future__ import annotations

from pathlib import Path

from eff_http import add_static_page
from fastapi import FastAPI

_FILES = {"/": "index.html"} | {
    f"/static/{name}": name for name in ("chat.css", "chat.js", "api.js", "markdown.js", "store.js")
}
_FOLDER = Path(__file__).parents[1] / "web" / "static"


def add_chat_page(app: FastAPI) -> None:
    """Add the routes of the page and its files."""
    add_static_page(app, _FOLDER, _FILES)

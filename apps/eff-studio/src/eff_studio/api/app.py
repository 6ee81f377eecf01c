"""The app: routes, keys, limits, the page."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from eff_http import BodyLimits, Gate, GateRules, add_error_handlers, add_static_page
from fastapi import FastAPI

from eff_studio.api import jobs, openai, pictures, system
from eff_studio.api.settings import ServerSettings
from eff_studio.api.studio import Studio
from eff_studio.worker import Worker

_OPEN = ("/health", "/version", "/", "/static/")
_STATIC = Path(__file__).parents[1] / "web" / "static"


def create_app(worker: Worker, settings: ServerSettings | None = None) -> FastAPI:
    """Make the HTTP app around a started worker.

    Args:
        worker: Does the jobs; the caller starts and stops it.
        settings: Keys and limits.
    """
    settings = ServerSettings() if settings is None else settings
    app = FastAPI(title="eff-studio", version=metadata.version("eff-studio"), docs_url=None, redoc_url=None)
    studio = app.state.studio = Studio(worker, settings)
    app.state.limits = BodyLimits(max_bytes=settings.max_json_bytes)
    for router in (jobs.router, pictures.router, openai.router, openai.uploads, system.router):
        app.include_router(router)
    if settings.page:
        files = {f"/static/{p.relative_to(_STATIC)}": str(p.relative_to(_STATIC)) for p in _files()}
        add_static_page(app, _STATIC, {"/": "index.html", **files})
    add_error_handlers(app)
    rules = GateRules(api_keys=settings.api_keys, open_paths=_OPEN, hosts=settings.hosts)
    app.add_middleware(Gate, rules=rules, count=studio.metrics.responded)
    return app


def _files() -> list[Path]:
    return [p for p in sorted(_STATIC.rglob("*")) if p.suffix in (".js", ".css", ".svg")]

"""Health, version, metrics."""

from __future__ import annotations

from importlib import metadata

from eff_http import internal_error
from fastapi import APIRouter, Request, Response

from eff_studio.api.metrics import CONTENT_TYPE
from eff_studio.api.studio import studio_of

router = APIRouter(tags=["system"])


@router.get("/health")
async def health(request: Request) -> dict[str, str]:
    """200 while the server takes jobs, 503 while it closes, 500 if nothing works through them."""
    studio = studio_of(request)
    if studio.draining:
        raise studio.closing()
    if not studio.worker.alive:
        raise internal_error("the thread that draws has ended; the server's log says why")
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    """Version of the server."""
    return {"version": metadata.version("eff-studio")}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(studio_of(request).metrics.render(), media_type=CONTENT_TYPE)

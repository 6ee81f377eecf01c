"""What is served and how it is: /v1/models, /health, /version, /metrics."""

from __future__ import annotations

from importlib import metadata

from fastapi import APIRouter, Request, Response

from eff_serve.api.documented import errors
from eff_serve.api.metrics import CONTENT_TYPE
from eff_serve.api.schema.common import Health, ModelCard, ModelList, Version
from eff_serve.api.serving import Serving

router = APIRouter(tags=["system"])


def _card(serving: Serving, adapter: str | None = None) -> ModelCard:
    settings = serving.settings
    return ModelCard(
        id=serving.name_of(adapter),
        created=settings.created,
        max_model_len=serving.engine.max_model_len,
        input_modalities=["text"] if serving.eyes is None else ["text", "image"],
        steering=list(serving.steering),
        quantization=settings.quantization,
    )


@router.get("/v1/models", responses=errors(401, 503))
async def models(request: Request) -> ModelList:
    """The model that is served, and each of its adapters."""
    serving: Serving = request.app.state.serving
    return ModelList(data=[_card(serving, adapter) for adapter in (None, *serving.adapters)])


@router.get("/v1/models/{name:path}", responses=errors(401, 404, 503))
async def model(name: str, request: Request) -> ModelCard:
    """One model by name."""
    serving: Serving = request.app.state.serving
    return _card(serving, serving.check_model(name))


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=errors(503))
async def health(request: Request) -> Health:
    """200 while the server takes requests, 503 while it loads or shuts down."""
    serving: Serving = request.app.state.serving
    serving.check()
    return Health(status="ok")


@router.get("/version")
async def version() -> Version:
    """Version of the server."""
    return Version(version=metadata.version("eff-serve"))


@router.get("/metrics", response_class=Response, responses=errors(401))
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    serving: Serving = request.app.state.serving
    return Response(serving.metrics.render(), media_type=CONTENT_TYPE)

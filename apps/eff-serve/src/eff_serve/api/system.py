"""What is served and how it is: /v1/models, /health, /version, /metrics."""

from __future__ import annotations

from importlib import metadata

from fastapi import APIRouter, Request, Response

from eff_serve.api.documented import errors
from eff_serve.api.metrics import CONTENT_TYPE
from eff_serve.api.models import Models
from eff_serve.api.schema.common import Health, ModelCard, ModelList, Version
from eff_serve.api.serving import Serving

router = APIRouter(tags=["system"])


def _card(serving: Serving, adapter: str | None = None) -> ModelCard:
    settings = serving.settings
    return ModelCard(
        id=serving.name_of(adapter),
        created=settings.created,
        max_model_len=serving.max_model_len,
        input_modalities=["text"] if serving.eyes is None else ["text", "image"],
        steering=list(serving.steering),
        quantization=settings.quantization,
        state=serving.state,
    )


@router.get("/v1/models", responses=errors(401, 503))
async def models(request: Request) -> ModelList:
    """The models that are served, loaded or not, and each of their adapters."""
    models: Models = request.app.state.models
    if models.default.source is None:
        _ = models.default.engine  # 503 while there is none
    return ModelList(data=[_card(s, adapter) for s in models.all for adapter in (None, *s.adapters)])


@router.get("/v1/models/{name:path}", responses=errors(401, 404, 503))
async def model(name: str, request: Request) -> ModelCard:
    """One model by name."""
    models: Models = request.app.state.models
    serving = models.find(name)
    if serving.source is None:
        _ = serving.engine  # 503 while there is none
    return _card(serving, serving.check_model(name))


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=errors(503))
async def health(request: Request) -> Health:
    """200 while the server takes requests, 503 while it loads or shuts down."""
    models: Models = request.app.state.models
    models.check()
    return Health(status="ok")


@router.get("/version")
async def version() -> Version:
    """Version of the server."""
    return Version(version=metadata.version("eff-serve"))


@router.get("/metrics", response_class=Response, responses=errors(401))
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    models: Models = request.app.state.models
    return Response(models.families.render(), media_type=CONTENT_TYPE)

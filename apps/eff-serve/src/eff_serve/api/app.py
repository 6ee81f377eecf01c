"""The app: routes, keys, the clock and counter of every request."""

from __future__ import annotations

from functools import partial
from importlib import metadata

from eff_http import BodyLimits, Gate, GateRules, add_error_handlers
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from eff_serve.api import adapters, chat, completions, embeddings, ollama, page, responses, system, tokens
from eff_serve.api.models import HoldingModels, Models
from eff_serve.api.pictures import Eyes
from eff_serve.api.serving import Serving
from eff_serve.api.settings import Settings
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.engine.types import Engine

# The chat page itself holds nothing secret; it sends the key with each of its calls.
_OPEN = ("/health", "/version", "/openapi.json", "/", "/static/")


def create_app(
    engine: Engine | None, tokenizer: Tokenizer | None, settings: Settings, eyes: Eyes | None = None
) -> FastAPI:
    """Make the HTTP app of a model.

    Args:
        engine: Started engine; None while it loads (`Serving.ready` hands it in later, as ``app.state.serving``).
        tokenizer: The model's tokenizer, or None like the engine.
        settings: Names, keys, limits.
        eyes: What the model sees with; None for a model that reads text only.
    """
    return create_models_app(Models([Serving(engine, tokenizer, settings, eyes)]), settings)


def create_models_app(models: Models, settings: Settings) -> FastAPI:
    """Make the HTTP app of several models.

    Args:
        models: What is served; the first is the default, also as ``app.state.serving``.
        settings: Keys and limits; names and facts are those of each model's own.
    """
    app = FastAPI(title="eff-serve", version=metadata.version("eff-serve"), docs_url=None, redoc_url=None)
    app.state.models, app.state.serving = models, models.default
    app.state.limits = BodyLimits(
        max_bytes=settings.max_body_bytes, max_seconds=settings.body_timeout, max_depth=settings.max_json_depth
    )
    for module in (chat, completions, responses, system, tokens, ollama, embeddings):
        app.include_router(module.router)
    app.include_router(embeddings.ollama_router)
    if settings.adapter_root is not None:
        app.include_router(adapters.router)
    if settings.chat_page:
        page.add_chat_page(app)
    add_error_handlers(app)
    open_paths = _OPEN if settings.protect_metrics else (*_OPEN, "/metrics")
    rules = GateRules(api_keys=settings.api_keys, open_paths=open_paths, hosts=settings.hosts)
    one_name = models.default.settings.model_id if len(models.all) == 1 else ""  # several have no name in common
    app.add_middleware(HoldingModels)
    app.add_middleware(Gate, rules=rules, count=partial(models.families.responded, one_name))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app

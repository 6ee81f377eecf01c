"""The state of one app: what it serves, and whether it takes requests."""

from __future__ import annotations

import asyncio
from typing import Literal

from eff_http import ApiError, retry_later

from eff_serve.api.general import GeneralRequests
from eff_serve.api.metrics import Metrics
from eff_serve.api.pictures import Eyes
from eff_serve.api.settings import Settings
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.engine.types import Engine, EngineStats

State = Literal["loading", "ready", "draining", "failed"]


class Serving:
    """Engine, tokenizer, eyes, settings and metrics of one app. An app without an engine is loading."""

    def __init__(
        self, engine: Engine | None, tokenizer: Tokenizer | None, settings: Settings, eyes: Eyes | None = None
    ) -> None:
        self.settings = settings
        self.eyes: Eyes | None = None
        self.metrics = Metrics(settings.model_id, self._stats)
        self.state: State = "loading"
        self.one_embedding = asyncio.Semaphore(1)
        self.general_requests = GeneralRequests()
        self._engine: Engine | None = None
        self._tokenizer: Tokenizer | None = None
        if engine is not None and tokenizer is not None:
            self.ready(engine, tokenizer, eyes)

    def ready(self, engine: Engine, tokenizer: Tokenizer, eyes: Eyes | None = None) -> None:
        """Begin to take requests; the engine has been started. Without eyes the model reads text only."""
        self._engine, self._tokenizer, self.eyes = engine, tokenizer, eyes
        self.metrics.model_loaded(engine.max_model_len)
        if self.state == "loading":
            self.state = "ready"

    def fail(self) -> None:
        """The model could not be loaded."""
        self.state = "failed"

    def drain(self) -> None:
        """Take no new requests from now on; running ones go on."""
        self.state = "draining"

    def admit(self) -> tuple[Engine, Tokenizer]:
        """Let a request for generation in: the engine and the tokenizer; otherwise 503, which is counted."""
        if self.state != "ready":
            self.metrics.rejected(self.state)
        self.check()
        return self.engine, self.tokenizer

    def check(self) -> None:
        """Raise 503 unless the server takes requests."""
        if self.state == "ready":
            return
        message = {"loading": "the model is being loaded", "draining": "the server is shutting down"}
        raise retry_later(503, message.get(self.state, "the model could not be loaded"), self.state, 5)

    @property
    def engine(self) -> Engine:
        """The engine; 503 while there is none."""
        if self._engine is None:
            self.check()
            raise RuntimeError("a server that is ready has an engine")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; 503 while there is none."""
        if self._tokenizer is None:
            self.check()
            raise RuntimeError("a server that is ready has a tokenizer")
        return self._tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that requests may ask for, as ``model:name``."""
        return () if self._engine is None else tuple(getattr(self._engine, "adapters", ()))

    @property
    def steering(self) -> tuple[str, ...]:
        """Methods of steering that requests may ask for."""
        return () if self._engine is None else tuple(getattr(self._engine, "steering", ()))

    def name_of(self, adapter: str | None) -> str:
        """The model's name with an adapter, or that of the base."""
        return self.settings.model_id if adapter is None else f"{self.settings.model_id}:{adapter}"

    def check_model(self, name: str | None) -> str | None:
        """The adapter that a model's name asks for; None is the base. 404 for a model that is not served."""
        settings = self.settings
        if name is None or name in (settings.model_id, *settings.aliases):
            return None
        base, _, adapter = name.rpartition(":")
        if base in (settings.model_id, *settings.aliases) and adapter in self.adapters:
            return adapter
        served = ", ".join(repr(self.name_of(a)) for a in (None, *self.adapters))
        message = f"the model {name[:100]!r} is not served here; use {served}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def _stats(self) -> EngineStats | None:
        return None if self._engine is None else self._engine.stats()

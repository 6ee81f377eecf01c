"""The state of one app: what it serves, and whether it takes requests."""

from __future__ import annotations

from typing import Literal

from eff_serve.api.errors import ApiError, retry_later
from eff_serve.api.metrics import Metrics
from eff_serve.api.settings import Settings
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.engine.types import Engine, EngineStats

State = Literal["loading", "ready", "draining", "failed"]


class Serving:
    """Engine, tokenizer, settings and metrics of one app. An app without an engine is loading."""

    def __init__(self, engine: Engine | None, tokenizer: Tokenizer | None, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.model_id, self._stats)
        self.state: State = "loading"
        self._engine: Engine | None = None
        self._tokenizer: Tokenizer | None = None
        if engine is not None and tokenizer is not None:
            self.ready(engine, tokenizer)

    def ready(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """Begin to take requests; the engine has been started."""
        self._engine, self._tokenizer = engine, tokenizer
        self.metrics.model_loaded(engine.max_model_len)
        if self.state == "loading":
            self.state = "ready"

    def drain(self) -> None:
        """Take no new requests from now on; running ones go on."""
        self.state = "draining"

    def check(self) -> None:
        """Raise 503 unless the server takes requests."""
        if self.state == "ready":
            return
        self.metrics.rejected(self.state)
        message = {"loading": "the model is being loaded", "draining": "the server is shutting down"}
        raise retry_later(503, message.get(self.state, "the model could not be loaded"), self.state, 5)

    @property
    def engine(self) -> Engine:
        """The engine of a server that takes requests; 503 otherwise."""
        self.check()
        assert self._engine is not None
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a server that takes requests; 503 otherwise."""
        self.check()
        assert self._tokenizer is not None
        return self._tokenizer

    def check_model(self, name: str | None) -> None:
        """Raise 404 for another model than the one served."""
        settings = self.settings
        if name is not None and name not in (settings.model_id, *settings.aliases):
            message = f"the model {name[:100]!r} is not served here; use {settings.model_id!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _stats(self) -> EngineStats | None:
        return None if self._engine is None else self._engine.stats()

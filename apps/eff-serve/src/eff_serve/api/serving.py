"""The state of one model: what it is, and whether it takes requests."""

from __future__ import annotations

import asyncio
from typing import Literal, NamedTuple, Protocol

from eff_http import ApiError, retry_later

from eff_serve.api.general import GeneralRequests
from eff_serve.api.metrics import Families, Metrics
from eff_serve.api.pictures import Eyes
from eff_serve.api.settings import Settings
from eff_serve.api.tokenizer import Tokenizer
from eff_serve.engine.types import Engine, EngineStats

State = Literal["unloaded", "loading", "ready", "draining", "failed"]


class Loaded(NamedTuple):
    """A model that was loaded for requests, its engine started; ``memory`` in bytes."""

    engine: Engine
    tokenizer: Tokenizer
    settings: Settings
    memory: int
    eyes: Eyes | None = None


class Source(Protocol):
    """Where a model comes from that is loaded when it is asked for."""

    def expected_memory(self) -> int:
        """Bytes that it will take, as far as its files tell; may read files."""
        ...

    def load(self) -> Loaded:
        """Load it; takes seconds."""
        ...


class Serving:
    """One model as it is served: engine, tokenizer, eyes, settings and metrics.

    Without an engine it is loading; with a ``source`` it comes and goes, see `Models`.

    Attributes:
        holders: Requests that have it, or wait for it.
        used: When the last of them ended, in seconds of the monotonic clock.
        memory: Bytes that it takes, 0 while that is not known.
    """

    def __init__(
        self,
        engine: Engine | None,
        tokenizer: Tokenizer | None,
        settings: Settings,
        eyes: Eyes | None = None,
        *,
        memory: int = 0,
        source: Source | None = None,
        families: Families | None = None,
    ) -> None:
        self.settings, self.source = settings, source
        self.eyes: Eyes | None = None
        self.metrics = Metrics(families or Families(), settings.model_id, self._stats)
        self.state: State = "loading" if source is None else "unloaded"
        self.one_embedding = asyncio.Semaphore(1)
        self.general_requests = GeneralRequests()
        self.holders, self.used, self.memory = 0, 0.0, memory
        self.bringing: asyncio.Task[None] | None = None
        self._engine: Engine | None = None
        self._tokenizer: Tokenizer | None = None
        if engine is not None and tokenizer is not None:
            self.ready(engine, tokenizer, eyes)

    def ready(self, engine: Engine, tokenizer: Tokenizer, eyes: Eyes | None = None) -> None:
        """Begin to take requests; the engine has been started. Without eyes the model reads text only."""
        self._engine, self._tokenizer, self.eyes = engine, tokenizer, eyes
        self.memory = self.memory or self.settings.weight_bytes
        self.metrics.model_loaded(engine.max_model_len, self.memory)
        if self.state == "loading":
            self.state = "ready"

    def loaded(self, model: Loaded, seconds: float) -> None:
        """Begin to take requests with a model that its source gave within ``seconds``."""
        self.settings, self.memory = model.settings, model.memory
        self._engine, self._tokenizer, self.eyes = model.engine, model.tokenizer, model.eyes
        self.metrics.model_loaded(model.engine.max_model_len, model.memory, seconds)
        self.state = "ready"

    def unloaded(self) -> Engine | None:
        """Let go of the model; returns the engine, which is still to be stopped."""
        engine, self._engine, self._tokenizer, self.eyes = self._engine, None, None, None
        self.state = "unloaded"
        self.metrics.model_unloaded()
        return engine

    @property
    def max_model_len(self) -> int | None:
        """Most tokens of a sequence; None while the model is not loaded."""
        return None if self._engine is None else self._engine.max_model_len

    def stop(self, grace: float) -> None:
        """Stop the engine, if there is one."""
        if self._engine is not None:
            self._engine.stop(grace)

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
        base, _, adapter = (name or "").rpartition(":")
        if name is not None and base in (settings.model_id, *settings.aliases) and adapter in self.adapters:
            return adapter
        if self.answers_to(name):
            return None
        served = ", ".join(repr(self.name_of(a)) for a in (None, *self.adapters))
        message = f"the model {(name or '')[:100]!r} is not served here; use {served}"
        raise ApiError(404, message, param="model", code="model_not_found")

    def answers_to(self, name: str | None) -> bool:
        """Whether a name means this model, or one of its adapters."""
        names = (self.settings.model_id, *self.settings.aliases)
        base, _, adapter = (name or "").rpartition(":")
        return name is None or name in names or (base in names and adapter in self.adapters)

    def _stats(self) -> EngineStats | None:
        return None if self._engine is None else self._engine.stats()

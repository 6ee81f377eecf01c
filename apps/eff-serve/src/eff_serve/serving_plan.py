"""From the command line to the models that an app serves: one loaded at once, or several that come when asked for."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from eff_serve.api.adapter import ServedTokenizer
from eff_serve.api.metrics import Families
from eff_serve.api.models import Models
from eff_serve.api.serving import Loaded, Serving
from eff_serve.api.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eff_serve.engine import EngineConfig, LoadedModel
    from eff_serve.replicas import About, ReplicaEngine


class ModelSource:
    """A model that is loaded when it is asked for.

    Args:
        config: Which, and how.
        settings: Those of the server, with the model's name.
    """

    def __init__(self, config: EngineConfig, settings: Settings) -> None:
        self.config, self._settings = config, settings

    def expected_memory(self) -> int:
        """See `Source.expected_memory`."""
        from eff_serve.engine.load import expected_memory

        return expected_memory(self.config)

    def load(self) -> Loaded:
        """See `Source.load`."""
        from eff_serve.engine import load_engine

        return started(load_engine(self.config, progress=False), self._settings)


def started(model: LoadedModel, settings: Settings) -> Loaded:
    """Start a model's engine, and put what is known of it with the settings, whose ``model_id`` stays."""
    model.engine.start()
    decoder = model.engine.decoder
    facts = _with_facts(settings, model, decoder.config.architecture, decoder.weight_bytes)
    tokenizer = ServedTokenizer(model.tokenizer, decoder.config.eos_token_ids)
    return Loaded(model.engine, tokenizer, facts, model.memory, model.eyes)


def _with_facts(settings: Settings, model: LoadedModel | About, architecture: str, weight_bytes: int) -> Settings:
    return replace(
        settings,
        created=int(time.time()),
        family=architecture.removesuffix("ForCausalLM").lower(),
        quantization=model.quantization,
        weight_bytes=weight_bytes,
        fingerprint=model.fingerprint,
    )


def one_model(model: LoadedModel, settings: Settings) -> Models:
    """A server of one model, which is there from the beginning on."""
    loaded = started(model, settings)
    return Models([Serving(loaded.engine, loaded.tokenizer, loaded.settings, loaded.eyes, memory=loaded.memory)])


def replicated_model(engine: ReplicaEngine, settings: Settings) -> Models:
    """A server of one model with several replicas."""
    from eff_serve.engine.load import load_tokenizer

    about = engine.about
    facts = _with_facts(settings, about, about.architecture, about.weight_bytes)
    tokenizer = ServedTokenizer(load_tokenizer(engine.config), about.eos_token_ids)
    return Models([Serving(engine, tokenizer, facts, memory=engine.count * about.memory)])


def several_models(
    configs: Sequence[tuple[str, EngineConfig]], settings: Settings, *, memory_limit: int | None, load_timeout: float
) -> Models:
    """A server of several models by name, each loaded for the first request that names it."""
    families = Families()
    servings = []
    for name, config in configs:
        named = replace(settings, model_id=name, aliases=())
        servings.append(Serving(None, None, named, source=ModelSource(config, named), families=families))
    return Models(servings, memory_limit=memory_limit, load_timeout=load_timeout)

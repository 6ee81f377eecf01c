"""Continuous batching over a lean decoder."""

from eff_serve.engine.load import LoadedModel, load_engine
from eff_serve.engine.types import Sampling
from eff_serve.engine_config import EngineConfig

__all__ = ["EngineConfig", "LoadedModel", "Sampling", "load_engine"]

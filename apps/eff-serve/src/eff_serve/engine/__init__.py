"""Continuous batching over a lean decoder."""

from eff_serve.engine.load import LoadedModel, load_engine
from eff_serve.engine.types import Sampling

__all__ = ["LoadedModel", "Sampling", "load_engine"]

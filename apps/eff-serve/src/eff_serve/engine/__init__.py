"""Continuous batching over a lean decoder."""

from eff_serve.engine.load import LoadedModel, load_engine

__all__ = ["LoadedModel", "load_engine"]

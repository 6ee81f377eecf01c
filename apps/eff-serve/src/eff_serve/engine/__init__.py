"""Continuous batching over a lean decoder."""

"""Answers to what the engine refuses."""

from __future__ import annotations

from eff_http import ApiError, retry_later

from eff_serve.engine.types import DrainingError, QueueFullError


def queue_full(error: QueueFullError) -> ApiError:
    """429 for a full waiting line."""
    return retry_later(429, str(error), "queue_full", error.retry_after)


def draining(error: DrainingError) -> ApiError:
    """503 while the server shuts down."""
    return retry_later(503, str(error) or "the server is shutting down", "draining", 5)

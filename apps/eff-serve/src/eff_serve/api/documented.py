"""What the OpenAPI schema says about responses."""

from __future__ import annotations

from typing import Any

from eff_http import ErrorResponse
from pydantic import BaseModel

from eff_serve.api.schema.ollama import OllamaError

_MEANING = {
    400: "A field is unknown, not supported or has a bad value; ``error.param`` names it.",
    401: "No API key, or a wrong one.",
    404: "Another model than the one served.",
    413: "The body is too long.",
    429: "The waiting line is full; ``Retry-After`` says when to try again.",
    500: "The server failed.",
    503: "The model is being loaded, or the server is shutting down.",
    504: "The answer was not complete within the server's deadline.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses for these error statuses."""
    return {status: {"model": ErrorResponse, "description": _MEANING[status]} for status in statuses}


def json_or_events(
    whole: type[BaseModel], event: type[BaseModel], *, done: bool = True
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of a generating endpoint: a whole body, or with ``stream`` one of events.

    Args:
        whole: The body.
        event: What the data of an event are.
        done: The last event is ``[DONE]``.
    """
    text = f"One event: `data` is a {event.__name__} as JSON{', and `[DONE]` in the last one' if done else ''}."
    data = {"type": "string", "contentMediaType": "application/json"}
    schema = {"type": "object", "description": text, "properties": {"data": data}, "required": ["data"]}
    stream = {"schema": schema}
    return {
        200: {"model": whole, "description": "The answer.", "content": {"text/event-stream": stream}},
        **errors(400, 401, 404, 413, 429, 500, 503, 504),
    }


def ollama_errors(whole: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """OpenAPI responses of Ollama's endpoints: errors as text, and an answer whole or as lines of JSON."""
    statuses = (400, 404, 413, 429, 500, 503, 504)
    found: dict[int | str, dict[str, Any]] = {s: {"model": OllamaError, "description": _MEANING[s]} for s in statuses}
    found[401] = {"model": ErrorResponse, "description": _MEANING[401]}
    if whole is not None:
        lines = {"application/x-ndjson": {"schema": {"type": "string"}}}
        found[200] = {
            "model": whole,
            "description": "The answer; with `stream` a line for each piece.",
            "content": lines,
        }
    return found

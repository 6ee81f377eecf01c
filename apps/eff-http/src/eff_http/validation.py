"""From pydantic's list of errors to one 400 that names the field at fault."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eff_http.errors import ApiError, bad_request


def from_validation(errors: Any, body: Any) -> ApiError:
    """400 from pydantic's list of errors: the most specific one, with its field spelt as a path.

    A union reports an error for each of its branches; the deepest path belongs to the branch that fits best. Our own
    refusals (type ``refused``) come first, for they say most.
    """
    ranked = [(error["type"] == "refused", len(_path(error, body)), error) for error in errors]
    best = max(ranked, key=lambda r: r[:2])[2]
    param = _spell(_path(best, body)) or None
    if best["type"] == "extra_forbidden":
        return bad_request(
            f"unknown field {param!r}; fields that would have no effect are refused", param, "unknown_field"
        )
    message = best["msg"].removeprefix("Value error, ")
    if best["type"] != "refused":
        message = f"{param or 'body'}: {message}{_seen(best)}"
    return bad_request(message, param, "missing_field" if best["type"] == "missing" else "invalid_value")


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The error's location without pydantic's names of union branches, which lead to nothing in the body."""
    path: list[str | int] = []
    here = body
    location = [part for part in error["loc"] if part not in ("body", "query", "path")]
    for i, part in enumerate(location):
        if isinstance(here, dict) and isinstance(part, str) and part in here:  # noqa: SIM114 - mypy narrows each
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif not (error["type"] == "missing" and i == len(location) - 1):
            continue
        path.append(part)
    param = error.get("ctx", {}).get("param") if error["type"] == "refused" else ""
    return [*path, param] if param else path


def _spell(path: list[str | int]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")[:200]


def _seen(error: Mapping[str, Any]) -> str:
    value = error.get("input")
    if error["type"] == "missing" or not isinstance(value, str | int | float | bool):
        return ""
    text = repr(value)
    return f" (got {text if len(text) <= 60 else text[:57] + '...'})"

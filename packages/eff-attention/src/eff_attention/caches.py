"""The argument of transformers' models that takes the cache."""

from __future__ import annotations

import inspect
from typing import Any


def cache_name(module: Any) -> str:
    """What a model or layer calls its cache, as argument and in its output: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def cache_kwargs(module: Any, cache: Any) -> dict[str, Any]:
    """``cache`` as the argument of a model or layer."""
    return {cache_name(module): cache}

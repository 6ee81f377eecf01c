"""The cache among the arguments and results of transformers' models: "cache" from 5.24 on, before "past_key_values"."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def cache_name(module: Any) -> str:
    """What a model or layer calls its cache, as argument and in its output: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def cache_kwargs(module: Any, cache: Any) -> dict[str, Any]:
    """``cache`` as the argument of a model or layer."""
    return {cache_name(module): cache}


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a decoder; None without one."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def returned_cache(output: Any) -> Any:
    """The cache in what a decoder gave; None without one."""
    return getattr(output, "cache", None) or getattr(output, "past_key_values", None)

"""The cache among the arguments and results of transformers' models: "cache" from 5.24 on, before "past_key_values"."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def cache_name(taker: Any) -> str:
    """What a model, a layer or a function calls its cache as an argument: "cache" from transformers 5.24 on."""
    # The class's forward: compiled code cannot look at that of an instance.
    function = getattr(type(taker), "forward", taker)
    return "cache" if "cache" in inspect.signature(function).parameters else "past_key_values"


def cache_kwargs(module: Any, cache: Any) -> dict[str, Any]:
    """``cache`` as the argument of a model or layer."""
    return {cache_name(module): cache}


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a decoder; None without one."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def returned_cache(output: Any) -> Any:
    """The cache in what a decoder gave; None without one."""
    cache = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if cache is None else cache

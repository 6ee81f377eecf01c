"""The argument of transformers' models that takes the cache."""

from __future__ import annotations

import inspect
from typing import Any


def cache_kwargs(module: Any, cache: Any) -> dict[str, Any]:
    """``cache`` by the name that a model or layer has for it: "cache" from transformers 5.24 on, or the older one."""
    return {"cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values": cache}

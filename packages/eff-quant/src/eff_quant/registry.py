"""All quantisation methods, by the class of their config and by the name in a checkpoint; each registers itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eff_quant.method import Method

METHODS: dict[type[Any], Method] = {}


def register(method: Method) -> Method:
    """Make a method known to `quantize_`, to the loaders and to the merging of adapters."""
    METHODS[method.config] = method
    return method


def method_of(config: object) -> Method:
    """The method to which settings belong.

    Raises:
        TypeError: to none.
    """
    method = METHODS.get(type(config))
    if method is None:
        known = ", ".join(c.__name__ for c in METHODS)
        raise TypeError(f"no quantisation method for a {type(config).__name__}; use {known}")
    return method


def config_from_dict(values: Mapping[str, Any]) -> Any:
    """Settings of any single method, from its ``to_dict``.

    Raises:
        ValueError: no method of that name; or as the method's own ``from_dict``.
    """
    name = values.get("quant_method")
    for config in METHODS:
        if config.quant_method == name:
            return config.from_dict(values)
    raise ValueError(f"no quantisation method {name!r}; eff_quant has {', '.join(map(repr, method_names()))}")


def method_names() -> list[str]:
    """The names that methods have in a checkpoint."""
    return [config.quant_method for config in METHODS]


def reader_of(settings: Mapping[str, Any]) -> Any:
    """The function that loads a folder of another library with this ``quantization_config``; None if no method does."""
    return next((m.read for m in METHODS.values() if m.read is not None and m.reads(settings)), None)

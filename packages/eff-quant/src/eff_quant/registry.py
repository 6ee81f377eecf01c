"""All quantisation methods, by the class of their config and by the name in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from eff_quant.fp4.method import METHOD as FP4
from eff_quant.fp8_qat.method import METHOD as FP8
from eff_quant.llm_int8.method import METHOD as INT8
from eff_quant.method import Method
from eff_quant.quantvla.method import METHOD as W4A8

METHODS: dict[type, Method] = {m.config: m for m in (INT8, FP4, FP8, W4A8)}
LAYERS: tuple[type[nn.Linear], ...] = tuple(m.layer for m in METHODS.values())


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
        if config.quant_method == name:  # type: ignore[attr-defined]
            return config.from_dict(values)  # type: ignore[attr-defined]
    known = ", ".join(repr(c.quant_method) for c in METHODS)  # type: ignore[attr-defined]
    raise ValueError(f"no quantisation method {name!r}; eff_quant has {known}")

"""What the configs of all methods share: checks of common fields, and the way to JSON types and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

BACKENDS = ("auto", "cpu", "triton", "reference")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError if a value is not one of its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; use one of {', '.join(map(repr, choices))}")


def check_patterns(config: object, *names: str) -> None:
    """Make tuples of lists of patterns; raise TypeError for a single string."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, str):
            raise TypeError(f"{name}={value!r} is one string; use a tuple of patterns, such as ({value!r},)")
        object.__setattr__(config, name, tuple(value))


def check_out_dtype(dtype: object) -> None:
    """Raise TypeError if this is neither a floating dtype nor None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"out_dtype={dtype!r}; use a floating torch.dtype or None")


def check_known(values: Mapping[str, Any], config: type[Any]) -> None:
    """Raise ValueError for entries that are no settings."""
    known = {f.name for f in fields(config)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown settings {unknown}; {config.__name__} has {sorted(known)}")


def check_version(values: Mapping[str, Any], config: type[Any], newest: int) -> int:
    """Check whose settings these are, and return their format version, ``newest`` if they name none.

    Raises:
        ValueError: another method's settings, or a version that this code does not know.
    """
    method = values.get("quant_method", config.quant_method)
    if method != config.quant_method:
        raise ValueError(f"quant_method={method!r}; {config.__name__} reads {config.quant_method!r}")
    version = values.get("version", newest)
    if not isinstance(version, int) or not 1 <= version <= newest:
        known = "version 1" if newest == 1 else f"versions 1 to {newest}"
        raise ValueError(f"settings of version {version!r}; this eff_quant reads {known}, a newer one may help")
    return version


def to_json(config: Any, version: int) -> dict[str, Any]:
    """The settings of a method as JSON types, with the format version and the method's name."""
    values = {f.name: _plain(getattr(config, f.name)) for f in fields(config)}
    return {"quant_method": config.quant_method, "version": version, **values}


def from_json(config: type[Any], values: Mapping[str, Any], newest: int) -> tuple[dict[str, Any], int]:
    """Arguments of a config from what `to_json` gave, and the format version they had.

    Raises:
        ValueError: another method's settings, a version that this code does not know, or an unknown entry.
    """
    version = check_version(values, config, newest)
    arguments = {name: value for name, value in values.items() if name not in ("quant_method", "version")}
    check_known(arguments, config)
    if isinstance(name := arguments.get("out_dtype"), str):
        arguments["out_dtype"] = getattr(torch, name, name)
    return arguments, version


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value

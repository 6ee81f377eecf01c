"""What the configs of the methods share: the way back from JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def read_settings(values: Mapping[str, Any], config: type[Any], version: int) -> dict[str, Any]:
    """The fields of a config from what its ``to_dict`` gave, without the format.

    Raises:
        ValueError: a key is unknown, or the format is another than ``version``.
    """
    fields = dict(values)
    if (seen := fields.pop("format", version)) != version:
        raise ValueError(f"settings have format {seen}; this version reads {version}")
    unknown = set(fields) - {f.name for f in dataclasses.fields(config)}
    if unknown:
        raise ValueError(f"{config.__name__} has no {sorted(unknown)}")
    return fields

"""What the configs of all methods share, on `eff_kernels.edit.Settings`: the method's name in JSON, common checks."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from eff_kernels.edit import Settings

Backend = Literal["auto", "cpu", "triton", "reference"]


class MethodSettings(Settings):
    """Settings of a method; in JSON they begin with the name that it has in a checkpoint."""

    __slots__ = ()

    quant_method: ClassVar[str]

    @classmethod
    def _all_tags(cls) -> dict[str, str]:
        return {"quant_method": cls.quant_method}


def check_out_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError if this is neither a floating dtype nor None."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"out_dtype={dtype!r}; use a floating torch.dtype or None")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError if an argument is not one of its choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}; use one of {', '.join(map(repr, choices))}")

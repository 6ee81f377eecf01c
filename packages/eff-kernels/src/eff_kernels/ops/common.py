"""Checks and shapes that ops of several folders share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from eff_kernels.op import Op


def check_float(x: Tensor, name: str = "x") -> None:
    """Raise TypeError unless a tensor has a float dtype."""
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must have a float dtype, got {x.dtype}")


def check_vector(x: Tensor, name: str, n: int) -> None:
    """Raise ValueError unless a tensor has shape [n]."""
    if x.shape != (n,):
        raise ValueError(f"{name} must have shape [{n}], got {list(x.shape)}")


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, packed: bool = False) -> None:
    """Raise unless x [..., K], weight [N, K], or packed as [N, K / 2], and bias [N] fit, x and bias of float dtypes."""
    shape, stored = x.shape, weight.shape
    if len(stored) != 2 or not shape or shape[-1] != (2 if packed else 1) * stored[1]:
        wanted = "packed [N, K / 2]" if packed else "weight [N, K]"
        raise ValueError(f"x [..., K] and {wanted} do not fit: got {list(shape)} and {list(stored)}")
    check_float(x)
    if bias is not None:
        check_vector(bias, "bias", stored[0])
        check_float(bias, "bias")


def check_groups(heads: int, kv_heads: int) -> None:
    """Raise ValueError unless query heads can share key heads evenly."""
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the number of query heads, {heads}, must be a multiple of the key heads, {kv_heads}")


def check_devices(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on one device, as `Op` does: kernels take addresses for granted."""
    if len({x.device for x in tensors.values()}) > 1:
        where = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {where}")


def check_rows(x: Tensor) -> None:
    """Raise unless x has rows, of a float dtype."""
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    check_float(x)


def over_rows(op: Op, x: Tensor, *args: Any, backend: str) -> Tensor:
    """Run an op from [T, K] to [T, N] on x [..., K], ``args`` being its other arguments."""
    shape = x.shape
    if len(shape) == 2:
        return op(x, *args, backend=backend)
    y = op(x.reshape(shape[:-1].numel(), shape[-1]), *args, backend=backend)
    return y.view(*shape[:-1], y.shape[-1])

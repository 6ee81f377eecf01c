"""Rounding to scaled FP8 and back, as a function through which gradients pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels import fp8_round
from torch import Tensor

from eff_quant.fp8_qat.config import FP8Spec

EPS = 1e-12
"""The least magnitude that is scaled by, as in `eff_kernels.fp8_quantize`."""


def fake_quant_fp8(x: Tensor, spec: FP8Spec, *, weight: bool = False, scale_grad: bool = False) -> Tensor:
    """Round x to the numbers that FP8 and its scales express.

    s = max(max |x|, 1e-12) / M over what shares a scale, and the result is round(x / s) * s, in float32
    and rounded once to the dtype of x. In the backward all of it is the identity, also for the largest entry.

    Args:
        x: [..., K]; a tensor that is not of a float dtype is returned as it is.
        spec: Format and scales.
        weight: Whether x is a weight [N, K], whose blocks are 128 x 128 with ``granularity="block"``.
        scale_grad: Let the gradient also flow through the scale, to the largest entries, as torchao does.

    Returns:
        Tensor like ``x``. What shares its scale with a NaN or an infinity is NaN.

    Raises:
        ValueError: ``scale_grad`` with scales that are powers of two, or blocks of a weight that is no matrix.
    """
    if not x.is_floating_point() or x.numel() == 0:
        return x
    if scale_grad and spec.power_of_two:
        raise ValueError("scale_grad=True with scales that are powers of two, which have no gradient; leave it out")

    def rounded(rows: Tensor) -> Tensor:
        if scale_grad:
            return _with_scale_gradient(rows, spec.torch_dtype)
        return fp8_round(rows, dtype=spec.torch_dtype, power_of_two=spec.power_of_two)

    if spec.granularity == "row":
        return rounded(x)
    if spec.granularity == "tensor":
        return rounded(x.reshape(1, -1)).view(x.shape)
    if spec.granularity == "block" and weight:
        return _in_tiles(x, rounded)
    return _in_groups(x, 128 if spec.granularity == "block" else 32, rounded)


def _in_groups(x: Tensor, size: int, rounded: Any) -> Tensor:
    """Groups of ``size`` entries of the last axis, the last one filled up with zeros, which change no scale."""
    k = x.shape[-1]
    padded = F.pad(x, (0, -k % size))
    return rounded(padded.reshape(-1, size)).view(padded.shape)[..., :k]


def _in_tiles(x: Tensor, rounded: Any) -> Tensor:
    """Tiles of 128 x 128."""
    if x.dim() != 2:
        raise ValueError(f"granularity='block' of a weight needs a matrix [N, K], got shape {list(x.shape)}")
    n, k = x.shape
    padded = F.pad(x, (0, -k % 128, 0, -n % 128))
    rows, columns = padded.shape[0] // 128, padded.shape[1] // 128
    tiles = padded.view(rows, 128, columns, 128).transpose(1, 2)
    done = rounded(tiles.reshape(rows * columns, -1)).view(rows, columns, 128, 128)
    return done.transpose(1, 2).reshape(padded.shape)[:n, :k]


def _with_scale_gradient(x: Tensor, dtype: torch.dtype) -> Tensor:
    wide, most = x.float(), torch.finfo(dtype).max
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=EPS) / most
    # No clamp: the largest entry over its scale misses M by one rounding at most, and is rounded to M.
    return (_Round.apply(wide / scale, dtype) * scale).to(x.dtype)


class _Round(torch.autograd.Function):
    """The numbers of the format; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None

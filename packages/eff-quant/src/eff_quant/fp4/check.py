"""Checks of the tensors that a file holds for one FP4 layer, before anything is computed with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from eff_quant.fp4.config import BLOCK

E8M0_NAN = 255


def check_fp4_tensors(
    name: str, tensors: Mapping[str, Tensor], format: str, shape: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Check the tensors of a layer, by their names in compressed-tensors, and return them as `FP4Linear` holds them.

    Args:
        name: The layer's name, for messages.
        tensors: ``weight_packed`` and what belongs to it; other names are left alone and not returned.
        format: ``"nvfp4"`` or ``"mxfp4"``.
        shape: [N, K] of the weight; by default that of ``weight_packed``.

    Raises:
        KeyError: a scale is missing.
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong, or a scale is NaN, inf or not positive.
    """
    name = name or "the layer"
    scale_dtype = torch.float8_e4m3fn if format == "nvfp4" else torch.uint8
    packed = tensors["weight_packed"]
    n, k = shape or (packed.shape[0], 2 * packed.shape[-1])
    wanted = {
        "weight_packed": (torch.uint8, [n, k // 2]),
        "weight_scale": (scale_dtype, [n, k // BLOCK[format]]),
        **({"weight_global_scale": (torch.float32, [1])} if format == "nvfp4" else {}),
    }
    if format == "nvfp4" and "input_global_scale" in tensors:
        wanted["input_global_scale"] = (torch.float32, [1])
    checked = {}
    for leaf, (dtype, sizes) in wanted.items():
        if leaf not in tensors:
            raise KeyError(f"{name}: weight_packed without {leaf}, which {format} needs")
        tensor = tensors[leaf]
        if dtype == torch.uint8 and tensor.dtype == torch.float8_e8m0fnu:
            tensor = tensor.view(torch.uint8)
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {leaf} has dtype {tensor.dtype}, wanted {dtype} for {format}")
        if tensor.numel() == 1 and sizes == [1]:
            tensor = tensor.reshape(1)
        if list(tensor.shape) != sizes:
            raise ValueError(f"{name}: {leaf} has shape {list(tensor.shape)}, wanted {sizes} for a weight [{n}, {k}]")
        if not tensor.is_meta:
            _check_values(name, leaf, tensor)
        checked[leaf] = tensor
    return checked


def _check_values(name: str, leaf: str, tensor: Tensor) -> None:
    if leaf == "weight_packed":
        return
    if leaf == "weight_scale":
        bad = tensor == E8M0_NAN if tensor.dtype == torch.uint8 else (tensor.view(torch.uint8) & 0x7F) == 0x7F
        if bad.any():
            row, block = torch.nonzero(bad)[0].tolist()
            raise ValueError(f"{name}: {leaf} of row {row}, block {block} is NaN")
        return
    uncalibrated = leaf == "input_global_scale" and tensor.isnan().all()
    if not uncalibrated and not (torch.isfinite(tensor) & (tensor > 0)).all():
        raise ValueError(f"{name}: {leaf} is {tensor.item()}, wanted a finite number above 0")

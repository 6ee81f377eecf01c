"""Constants of the formats, and the scale of a whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = {"nvfp4": 16, "mxfp4": 32}
"""Values that share a scale."""


SCALE_ROUNDINGS = ("floor", "even", "ceil", "rceil")


SMALLEST_E4M3, LARGEST_E4M3 = 2.0**-6, 448.0


_SMALLEST_GLOBAL_SCALE = 2.0**-120


def global_scale_of(x: Tensor) -> Tensor:
    """s_g = max |x| / (6 * 448), so that the largest block scale is the largest of E4M3; 1 for a tensor of zeros.

    At least 2^-120: below, the inverse of s_g times a block scale would be infinite.
    """
    if x.numel() == 0:
        return torch.ones((), device=x.device)
    low, high = x.aminmax()
    absmax = torch.maximum(-low, high).float()
    return torch.where(absmax == 0, 1.0, (absmax / (6 * LARGEST_E4M3)).clamp(min=_SMALLEST_GLOBAL_SCALE))


def block_of(format: str) -> int:
    """Values that share a scale; ValueError for an unknown format."""
    if format not in BLOCKS:
        raise ValueError(f"format must be 'nvfp4' or 'mxfp4', got {format!r}")
    return BLOCKS[format]


def check_scale_rounding(scale_rounding: str, format: str) -> None:
    """Raise ValueError unless the format knows that rounding of its scale."""
    if scale_rounding not in SCALE_ROUNDINGS:
        raise ValueError(f"scale_rounding must be one of {SCALE_ROUNDINGS}, got {scale_rounding!r}")
    if format == "nvfp4" and scale_rounding != "floor":
        raise ValueError(f"scale_rounding={scale_rounding!r} belongs to mxfp4; nvfp4 rounds its scales to nearest")


def check_global_scale(global_scale: Tensor | None, format: str, name: str) -> Tensor | None:
    """The global scale as a float32 scalar; ValueError if it has not one element or the format has none."""
    if global_scale is None:
        return None
    if format == "mxfp4":
        raise ValueError(f"mxfp4 has no global scale; leave out {name}")
    if global_scale.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {list(global_scale.shape)}")
    if global_scale.dtype is torch.float32 and global_scale.dim() == 0:
        return global_scale
    return global_scale.float().reshape(())


def check_codes(packed: Tensor, scale: Tensor, global_scale: Tensor | None, format: str) -> Tensor | None:
    """Check stored codes; returns the global scale as a float32 scalar."""
    block = block_of(format)
    wanted = torch.float8_e4m3fn if format == "nvfp4" else torch.uint8
    if packed.dtype is not torch.uint8:
        raise TypeError(f"packed must be uint8, got {packed.dtype}")
    if scale.dtype is not wanted:
        raise TypeError(f"{format} scales must be {wanted}, got {scale.dtype}")
    shape, blocks = packed.shape, scale.shape
    if not shape or 2 * shape[-1] % block:
        raise ValueError(f"{format} needs packed [..., K/2] with K a multiple of {block}, got {list(shape)}")
    if not blocks or blocks[:-1] != shape[:-1] or blocks[-1] * block != 2 * shape[-1]:
        raise ValueError(
            f"packed [..., K/2] and scale [..., K/{block}] do not fit: got {list(shape)} and {list(blocks)}"
        )
    if format == "nvfp4" and global_scale is None:
        raise ValueError("nvfp4 needs a global_scale, got None; use 1.0 for codes that have block scales only")
    return check_global_scale(global_scale, format, "global_scale")

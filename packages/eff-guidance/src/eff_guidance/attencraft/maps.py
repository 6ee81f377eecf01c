"""From attention to one refined map a token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_map(values: Tensor, dims: int = 2) -> Tensor:
    """(x - min) / (max - min) over the last ``dims`` dimensions, each map for itself.

    Raises:
        ValueError: a map is flat, so that it says nothing.
    """
    flat = values.flatten(-dims)
    low, high = flat.amin(-1), flat.amax(-1)
    if bool((high <= low).any()):
        raise ValueError(f"{int((high <= low).sum())} of {high.numel()} attention maps are flat; they show no concept")
    shape = (*low.shape, *([1] * dims))
    return (values - low.reshape(shape)) / (high - low).reshape(shape)


def resize_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [K, h, w] at another size, bicubic, cut to 0..1 where that overshoots.

    Values must lie in 0..1.
    """
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps[None], size, mode="bicubic", align_corners=False)[0].clamp(0, 1)


def refine_maps(cross: Tensor, self_attention: Tensor, size: tuple[int, int], *, power: int = 4) -> Tensor:
    """Spread each token's map over the regions that the picture itself holds together.

    r_i = norm(W p_i) with p_i = norm(C_i^2), W = norm(S^power), S brought to 0..1 first.

    Args:
        cross: Attention of places to tokens C, [K, h, w].
        self_attention: Attention of places among themselves S, rows are queries, [N, N]; N = H * W of ``size``.
        size: H and W of the result.
        power: Of the matrix.

    Returns:
        float32 [K, H, W] (float64 for float64), each from 0 to 1.

    Raises:
        ValueError: shapes do not fit, or a map is flat.
    """
    count = size[0] * size[1]
    if cross.dim() != 3 or self_attention.shape != (count, count):
        raise ValueError(
            f"cross {list(cross.shape)} and self-attention {list(self_attention.shape)} for {size}; "
            f"wanted [K, h, w] and [{count}, {count}]"
        )
    precise = torch.promote_types(cross.dtype, torch.float32)
    with torch.autocast(cross.device.type, enabled=False):
        squares = normalize_map(cross.to(precise) ** 2)
        maps = resize_map(squares, size).flatten(1)
        affinity = normalize_map(self_attention.to(precise))
        # Float32: the fourth power of a matrix of numbers up to 1 overflows float16.
        affinity = normalize_map(torch.linalg.matrix_power(affinity, power))
        return normalize_map((maps @ affinity.mT).unflatten(1, size))

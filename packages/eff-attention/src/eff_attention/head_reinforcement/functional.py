"""The formulas of VHD and VHR on the outputs of heads.

Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence (He and others, ACL 2025,
arXiv 2412.13949).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def vision_aware_divergence(with_image: Tensor, without_image: Tensor, *, relative: bool = False) -> Tensor:
    """VHD: how far the output of each head moves when the picture is taken away (eq. 4).

    Args:
        with_image: Outputs of heads before the output projection [..., H, d].
        without_image: The same without the picture.
        relative: Divide by the norm of the output without the picture.

    Returns:
        Euclidean distances, float32 at least [..., H].

    Raises:
        ValueError: the shapes differ.
    """
    if with_image.shape != without_image.shape or with_image.dim() < 2:
        raise ValueError(
            f"outputs must both be [..., H, d], got {list(with_image.shape)} and {list(without_image.shape)}"
        )
    here, there = _precise(with_image), _precise(without_image)
    distance = (here - there).norm(dim=-1)
    return distance / there.norm(dim=-1).clamp_min(torch.finfo(distance.dtype).tiny) if relative else distance


def token_vhd(vhd: Tensor | Mapping[int, Tensor] | Sequence[Tensor], k: int | None = None) -> Tensor:
    """T-VHD: the sum over layers of the k largest VHD of each (eq. 5): how much a token depends on the picture.

    Args:
        vhd: [L, ..., H], or a tensor [..., H] for each layer.
        k: Heads of a layer that count; None takes an eighth of them, at least one.

    Returns:
        [...].

    Raises:
        ValueError: k is out of range.
    """
    stacked = vhd if isinstance(vhd, Tensor) else torch.stack(list(vhd.values() if isinstance(vhd, Mapping) else vhd))
    heads = stacked.shape[-1]
    count = max(1, heads // 8) if k is None else k
    if not 1 <= count <= heads:
        raise ValueError(f"k={count}; use 1 to {heads}, the number of heads")
    return stacked.topk(count, -1).values.sum(-1).sum(0)


def reject_negative_heads(vhd: Tensor, activation: Tensor) -> Tensor:
    """Set VHD to 0 for heads whose activation surges when the picture goes away (eq. 6).

    These are heads above mean + standard deviation of their layer in both numbers; the deviation is that of a sample.

    Args:
        vhd: [..., H].
        activation: Squared norm of the outputs without picture [..., H].

    Returns:
        [..., H].

    Raises:
        ValueError: the shapes differ.
    """
    if vhd.shape != activation.shape:
        raise ValueError(f"vhd and activation must have one shape, got {list(vhd.shape)}, {list(activation.shape)}")
    if vhd.shape[-1] < 2:  # one head has no deviation
        return vhd
    return vhd.masked_fill(_surges(vhd) & _surges(activation), 0.0)


def select_heads(vhd: Tensor) -> Tensor:
    """The heads above the median of their layer (eq. 7): half of an even number without ties, bool [..., H].

    Of an even number the lower of the two middle values is the median.
    """
    return vhd > vhd.median(-1, keepdim=True).values


def _surges(x: Tensor) -> Tensor:
    return x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

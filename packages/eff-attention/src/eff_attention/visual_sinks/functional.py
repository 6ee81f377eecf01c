"""The formulas of VAR: what is a sink, which heads look at the picture, and how attention moves.

See What You Are Told: Visual Attention Sink in Large Multimodal Models (Kang and others, ICLR 2025, arXiv 2503.03321).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eff_attention.visual_sinks.config import Ratio, check_dims


def sink_values(hidden: Tensor, dims: Sequence[int], eps: float = 1e-6) -> Tensor:
    """phi(x) = max over ``dims`` of |x_d| / sqrt(mean_k x_k^2 + eps), at most sqrt(D).

    Args:
        hidden: Hidden states that enter a layer, before its norm [..., D].
        dims: Dimensions.
        eps: Added under the root.

    Returns:
        float32 [...].

    Raises:
        ValueError: ``dims`` is empty or holds one that does not exist.
    """
    check_dims(tuple(dims), hidden.shape[-1])
    # Squares of massive values would leave the range of float16.
    x = hidden.float()
    size = torch.linalg.vector_norm(x, dim=-1)
    return x[..., list(dims)].abs().amax(-1) * (size.square() / x.shape[-1] + eps).rsqrt()


def sink_mask(hidden: Tensor, dims: Sequence[int], tau: float) -> Tensor:
    """Which hidden states [..., D] are those of sinks: `sink_values` above tau, bool [...]."""
    return sink_values(hidden, dims) > tau


def image_centric_heads(
    attn: Tensor,
    image_mask: Tensor,
    sink_mask: Tensor,
    rho: float,
    min_image_mass: float = 0.2,
    *,
    ratio: Ratio = "non_sink",
) -> Tensor:
    """Which heads look at the picture itself, for each query (section 5.1).

    Args:
        attn: Weights after the softmax [B, H, Q, K].
        image_mask: Picture tokens, bool [B, K].
        sink_mask: Sinks, bool [B, K].
        rho: See `VARConfig`.
        min_image_mass: See `VARConfig`.
        ratio: See `VARConfig`.

    Returns:
        bool [B, H, Q]; False where no picture token is left to receive attention.

    Raises:
        ValueError: shapes do not fit.
    """
    vision, sinks = _columns(attn, image_mask, "image_mask"), _columns(attn, sink_mask, "sink_mask")
    weights = _precise(attn)
    mass = torch.where(vision, weights, 0.0).sum(-1)
    good = torch.where(vision & ~sinks, weights, 0.0).sum(-1)
    if ratio == "non_sink":
        looks = good >= rho * mass
    else:
        looks = torch.where(vision & sinks, weights, 0.0).sum(-1) <= rho * (mass + 1e-6 * vision.sum(-1))
    return (mass >= min_image_mass) & looks & (good > 0)


def redistribute_attention(
    attn: Tensor, image_mask: Tensor, sink_mask: Tensor, select: Tensor, p: float = 0.6
) -> Tensor:
    """Take the share p from all sinks and give it to picture tokens that are none, in proportion to their weight.

    Sinks become (1 - p) a; the others of the picture a + Omega a / sum of theirs with Omega = p sum_S a; the rest
    stays, and so does the sum of a row (section 5.2).

    Args:
        attn: Weights after the softmax [B, H, Q, K].
        image_mask: Picture tokens, bool [B, K].
        sink_mask: Sinks, those of the text included, bool [B, K].
        select: What is changed, bool [B, H, Q], such as from `image_centric_heads`.
        p: 0 to 1.

    Returns:
        The new weights in the dtype of ``attn``, computed in float32 at least. A row without a receiver is left alone.

    Raises:
        ValueError: p is out of range, or shapes do not fit.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p={p}; use 0 to 1")
    if select.shape != attn.shape[:-1]:
        raise ValueError(f"select must be {list(attn.shape[:-1])}, got {list(select.shape)}")
    vision, sinks = _columns(attn, image_mask, "image_mask"), _columns(attn, sink_mask, "sink_mask")
    weights = _precise(attn)
    budget = p * torch.where(sinks, weights, 0.0).sum(-1, keepdim=True)
    good = torch.where(vision & ~sinks, weights, 0.0).sum(-1, keepdim=True)
    enough = good > torch.finfo(good.dtype).tiny  # by less than this the share would leave the range
    gain = 1.0 + budget / good.where(enough, 1.0)
    new = torch.where(sinks, (1.0 - p) * weights, torch.where(vision, gain * weights, weights))
    return torch.where(select[..., None] & enough, new, weights).to(attn.dtype)


def _columns(attn: Tensor, mask: Tensor, name: str) -> Tensor:
    if attn.dim() != 4 or mask.shape != (attn.shape[0], attn.shape[3]):
        raise ValueError(f"{name} must be [B, K] for attn [B, H, Q, K], got {list(mask.shape)}, {list(attn.shape)}")
    return mask[:, None, None]


def _precise(attn: Tensor) -> Tensor:
    return attn if attn.dtype == torch.float64 else attn.float()

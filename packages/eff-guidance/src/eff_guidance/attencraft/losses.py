"""The losses; all are pure functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TINY = 1e-16


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions over the last dimension in nats, [...]; at most ln 2."""
    mean = ((p + q) / 2 + _TINY).log()
    terms = [(x * ((x + _TINY).log() - mean)).sum(-1) for x in (p, q)]
    return (terms[0] + terms[1]) / 2


def attention_js_loss(maps: Tensor, masks: Tensor) -> Tensor:
    """How far attention maps are from their masks: mean JS of the two, each a softmax over all places.

    Args:
        maps: From 0 to 1, [K, H, W]; with gradients.
        masks: From 0 to 1, [K, H, W].

    Returns:
        A scalar, between 0 and about 0.11, as values from 0 to 1 make softmaxes that are nearly flat.

    Raises:
        ValueError: shapes differ.
    """
    if maps.shape != masks.shape or maps.dim() != 3:
        raise ValueError(f"maps {list(maps.shape)} and masks {list(masks.shape)}; wanted [K, H, W] of both")
    with torch.autocast(maps.device.type, enabled=False):
        precise = torch.promote_types(maps.dtype, torch.float32)
        wanted = masks.to(precise).flatten(1).softmax(-1)
        return js_divergence(maps.to(precise).flatten(1).softmax(-1), wanted).mean()


def masked_denoising_loss(
    pred: Tensor, target: Tensor, mask: Tensor, background_weight: float = 0.5, *, valid: Tensor | None = None
) -> Tensor:
    """Squared error, by places: ((1 - w) m^2 + w) (pred - target)^2, summed over channels, per valid place.

    With w = 0.5 this is the mean of the masked and the unmasked error, which is what the published code computes. The
    divisor counts places and not channels.

    Args:
        pred: Prediction of the model, [B, C, H, W].
        target: What it should be.
        mask: m, from 0 to 1, [H, W] or [B, 1, H, W].
        background_weight: w, from 0 to 1.
        valid: Places that count, broadcasts to [B, 1, H, W]; None leaves the outermost cells out.

    Raises:
        ValueError: the mask does not fit, or w is outside of 0..1.
    """
    if not 0 <= background_weight <= 1:
        raise ValueError(f"background_weight={background_weight}; use a number from 0 to 1")
    size = (pred.shape[-2], pred.shape[-1])
    if tuple(mask.shape[-2:]) != size or pred.shape != target.shape:
        raise ValueError(f"pred {list(pred.shape)}, target {list(target.shape)} and mask {list(mask.shape)} do not fit")
    if valid is None:
        valid = inner(size).to(pred.device)
    weight = (1 - background_weight) * mask.float() ** 2 + background_weight
    error = (pred.float() - target.float()) ** 2
    kept = valid.float().expand(pred.shape[0], 1, *size)
    return (error * weight * kept).sum() / kept.sum()


def inner(size: tuple[int, int]) -> Tensor:
    """All places but the outermost, float32 [1, 1, H, W]."""
    return F.pad(torch.ones(1, 1, size[0] - 2, size[1] - 2), (1, 1, 1, 1))

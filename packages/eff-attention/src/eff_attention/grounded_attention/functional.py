"""The formulas of PAINT: which tokens of a picture carry information, and how attention to them is raised.

Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language Model (Arif and others,
arXiv 2501.12206).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eff_attention.grounded_attention.config import PAINTConfig, check_ratio, check_strength


def cls_patch_attention(vision_attn: Tensor, prefix: int = 1) -> Tensor:
    """What the class token attends to, summed over heads.

    Args:
        vision_attn: Weights of a layer of a vision tower [B, H, prefix + N, prefix + N], the class token first.
        prefix: Class token and registers.

    Returns:
        float32 at least [B, N].
    """
    return _precise(vision_attn[:, :, 0, prefix:]).sum(1)


def received_attention(vision_attn: Tensor, prefix: int = 1) -> Tensor:
    """What each patch gets from all patches, mean over heads [B, N].

    The published code sums over keys instead, where every row gives 1.
    """
    return _precise(vision_attn[:, :, prefix:, prefix:]).mean(1).sum(1)


def local_tokens(cls_attn: Tensor, ratio: float = 0.25) -> Tensor:
    """The share ``ratio`` of the N patches that is attended to most, rounded down, bool [..., N].

    Raises:
        ValueError: the ratio is out of range.
    """
    check_ratio("ratio", ratio)
    return _top(cls_attn, ratio)


def summary_tokens(cls_attn: Tensor, iqr: float = 1.5) -> Tensor:
    """Patches above Q3 + iqr (Q3 - Q1) of their picture, with quartiles as numpy's percentiles, bool [..., N].

    Raises:
        ValueError: ``iqr`` is negative.
    """
    check_strength("iqr", iqr)
    values = _precise(cls_attn)
    low, high = (values.quantile(q, -1, keepdim=True) for q in (0.25, 0.75))
    return values > high + iqr * (high - low)


def spatial_tokens(vision_attn: Tensor, ratio: float = 0.05, prefix: int = 1) -> Tensor:
    """The share of patches that other patches attend to most, of weights [B, H, prefix + N, prefix + N], bool [B, N].

    Raises:
        ValueError: the ratio is out of range.
    """
    check_ratio("ratio", ratio)
    return _top(received_attention(vision_attn, prefix), ratio)


def select_informed_tokens(
    vision_attentions: Sequence[Tensor], config: PAINTConfig | None = None, prefix: int = 1
) -> tuple[Tensor, Tensor]:
    """Local (with spatial) and summary tokens from the weights of all layers of a vision tower, bool [B, N] each.

    No token is both.
    """
    c = config or PAINTConfig()
    of = received_attention if c.saliency == "received" else cls_patch_attention
    first, late = vision_attentions[c.local_layer], vision_attentions[c.summary_layer]
    return chosen(of(first, prefix), of(late, prefix), received_attention(first, prefix), c)


def chosen(first: Tensor, late: Tensor, received: Tensor | None, config: PAINTConfig) -> tuple[Tensor, Tensor]:
    """Local and summary tokens, bool [..., N], from scores [..., N] of the first and the late layer."""
    local = local_tokens(first, config.local_ratio)
    if config.spatial_ratio and received is not None:
        local = local | _top(received, config.spatial_ratio)
    summary = torch.zeros_like(local) if config.summary_iqr is None else summary_tokens(late, config.summary_iqr)
    return local & ~summary, summary


def boost_attention_logits(
    logits: Tensor, local: Tensor, summary: Tensor, alpha: float, beta: float, head_gain: Tensor | None = None
) -> Tensor:
    """Each e becomes e + alpha |e| at local and e + beta |e| at summary tokens; hidden entries stay what they are.

    Args:
        logits: Before the softmax [B, H, Q, K]; hidden entries are -inf or the smallest number.
        local: bool [B, K].
        summary: bool [B, K].
        alpha: For local tokens.
        beta: For summary tokens.
        head_gain: Factor of both, [H] or [B, H].

    Returns:
        New logits in the dtype of ``logits``, computed in float32 at least.

    Raises:
        ValueError: shapes do not fit, or a strength is negative.
    """
    check_strength("alpha", alpha)
    check_strength("beta", beta)
    batch, heads, _, keys = logits.shape
    for name, mask in (("local", local), ("summary", summary)):
        if mask.shape != (batch, keys):
            raise ValueError(f"{name} must be {[batch, keys]} for logits {list(logits.shape)}, got {list(mask.shape)}")
    e = _precise(logits)
    strength = (alpha * local.to(e.dtype) + beta * summary.to(e.dtype))[:, None, None]
    if head_gain is not None:
        if head_gain.shape not in ((heads,), (batch, heads)):
            raise ValueError(f"head_gain must be [{heads}] or [{batch}, {heads}], got {list(head_gain.shape)}")
        strength = strength * head_gain.to(e)[..., None, None]
    seen = e > torch.finfo(logits.dtype).min / 2
    raised = e + strength * torch.where(seen, e, 0.0).abs()
    return torch.where(seen & (local | summary)[:, None, None], raised, e).to(logits.dtype)


def _top(score: Tensor, ratio: float) -> Tensor:
    count = math.floor(ratio * score.shape[-1] + 1e-9)
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()

"""Features of random-feature attention, and the kernel that they converge to (arXiv 2307.11353, section 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_attention.random_features.sampling import HeadWeights

BLOCK_NUMBERS = 1 << 16  # terms of the kernel held at a time: 512 KiB a temporary, so that they stay in the cache

Activation = Literal["relu", "softmax"] | Callable[[Tensor], Tensor]


def check_activation(activation: object) -> None:
    """Refuse what is neither a known word nor a function."""
    if activation not in ("relu", "softmax") and not callable(activation):
        raise ValueError(f"activation={activation!r}; use 'relu', 'softmax' or a function of a tensor of scores")


def append_ones(x: Tensor) -> Tensor:
    """x~ = [x; 1]."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)


def attention_features(
    query: Tensor, keys: Tensor, heads: HeadWeights, *, activation: Activation = "relu", keep: Tensor | None = None
) -> Tensor:
    """phi_m = M^-1/2 mean_i sigma(query^T W_m key_i) key_i; the softmax variant weights instead of averaging.

    Args:
        query: [B, Lq, Dq], a one appended where that is wanted.
        keys: [B, N, Dk], likewise. Masked keys must be finite.
        heads: M frozen products.
        activation: sigma: "relu", "softmax" over the keys, or an elementwise function.
        keep: Boolean, broadcastable to [B, Lq, N]: the keys that count. A query without any has features of 0.

    Returns:
        [B, Lq, M, Dk].
    """
    projected = heads.project(query)  # [B, Lq, M, Dk]
    if activation == "softmax":
        return _softmax_features(projected, keys, keep) * heads.num_heads**-0.5
    batch, length, num_heads, dim = projected.shape
    scores = (projected.flatten(1, 2) @ keys.mT).view(batch, length, num_heads, keys.shape[1])
    weights = torch.relu(scores) if activation == "relu" else activation(scores)
    if keep is None:
        weights = weights / max(keys.shape[1], 1)
    else:
        keep = keep.unsqueeze(-2)
        weights = weights.masked_fill(~keep, 0.0) / keep.sum(-1, keepdim=True).clamp_min(1)
    features = weights.flatten(1, 2) @ keys
    return features.view(batch, length, num_heads, dim) * num_heads**-0.5


def _softmax_features(projected: Tensor, keys: Tensor, keep: Tensor | None) -> Tensor:
    """Attention of all heads to one set of keys that are the values too, [B, Lq, M, Dk]; no scores are held."""
    if keys.shape[1] == 0:
        return torch.zeros_like(projected)
    mask = None if keep is None else keep.unsqueeze(-3)
    shared = keys.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        projected.transpose(1, 2), shared, shared, attn_mask=mask, scale=1.0, enable_gqa=True
    ).transpose(1, 2)
    # Rows without a key are 0/0 in some of SDPA's backends.
    return out if keep is None else out.masked_fill(~keep.any(-1)[..., None, None], 0.0)


def arc_cosine(cosine: Tensor) -> Tensor:
    """E[relu(s) relu(s')] of two standard Gaussians with correlation c = cos t: (sin t + (pi - t) cos t) / (2 pi)."""
    return ((1 - cosine.square()).sqrt() + (math.pi - cosine.arccos()) * cosine) / (2 * math.pi)


def attention_kernel(
    query: Tensor,
    keys: Tensor,
    other_query: Tensor,
    other_keys: Tensor,
    *,
    std: float = 0.5,
    keep: Tensor | None = None,
    other_keep: Tensor | None = None,
) -> Tensor:
    """The limit of phi(X) . phi(X') for M -> inf with ReLU and weights N(0, std^2).

    k(X, X') = mean_ij <x_i, x'_j> E[relu(s_i) relu(s'_j)], with s_i of deviation std |x_0| |x_i| and the correlation
    of s_i and s'_j the cosine of x_0 and x'_0 times that of x_i and x'_j.

    Args:
        query: [n, Dq].
        keys: [n, N, Dk].
        other_query: [n', Dq].
        other_keys: [n', N', Dk].
        std: Standard deviation of an entry of W.
        keep: Boolean [n, N], the keys that count.
        other_keep: Boolean [n', N'].

    Returns:
        [n, n']. Blocks of rows and columns of about BLOCK_NUMBERS terms are held at a time.
    """
    mine = _unit_vectors(query, keys, keep)
    theirs = mine if other_keys is keys else _unit_vectors(other_query, other_keys, other_keep)
    out = keys.new_zeros(len(keys), len(other_keys))
    pairs = max(1, BLOCK_NUMBERS // max(keys.shape[1] * other_keys.shape[1], 1))
    side = max(1, math.isqrt(pairs))
    for top in range(0, len(keys), side):
        rows = slice(top, top + side)
        for start in range(top if theirs is mine else 0, len(other_keys), side):
            columns = slice(start, start + side)
            block = _kernel_block(*(t[rows] for t in mine), *(t[columns] for t in theirs))
            out[rows, columns] = block
            if theirs is mine and start > top:
                out[columns, rows] = block.T
    return std**2 * out


def _unit_vectors(query: Tensor, keys: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of queries and keys, and the weights |x_0| |x_i|^2 / N [n, N] that the mean over keys gives them."""
    size = query.norm(dim=-1)
    sizes = keys.norm(dim=-1)
    counted = torch.ones_like(sizes) if keep is None else keep.to(sizes.dtype)
    weights = size[:, None] * sizes.square() * counted / counted.sum(-1, keepdim=True)
    tiny = torch.finfo(keys.dtype).tiny
    return query / size.clamp_min(tiny)[:, None], keys / sizes.clamp_min(tiny)[..., None], weights


def _kernel_block(q: Tensor, k: Tensor, w: Tensor, q_other: Tensor, k_other: Tensor, w_other: Tensor) -> Tensor:
    cosine = (k.flatten(0, 1) @ k_other.flatten(0, 1).T).view(*k.shape[:2], *k_other.shape[:2])  # [a, i, b, j]
    both = (cosine * (q @ q_other.T)[:, None, :, None]).clamp_(-1, 1)
    terms = arc_cosine(both).mul_(cosine).mul_(w_other)
    return torch.einsum("aib,ai->ab", terms.sum(-1), w)

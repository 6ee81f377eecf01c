"""Block-sparse attention in plain PyTorch: a dense mask and a softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.block_sparse_attention.args import Args, BackwardArgs


def expand_map(block_map: Tensor, block_q: int, block_k: int, queries: int, keys: int) -> Tensor:
    """Which key each query sees, bool [B, H, queries, keys]: where its block of the map is positive."""
    seen = (block_map > 0).repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)
    return seen[..., :queries, :keys]


def block_sparse_attention(*args: *Args) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of chosen blocks; 0 and minus infinity for a query without any."""
    q, k, v, block_map, block_q, block_k, scale = args
    groups = k.size(1)
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = expand_map(block_map, block_q, block_k, q.size(2), k.size(2)).unflatten(1, (groups, -1))
    scores = scale * q.to(wide).unflatten(1, (groups, -1)) @ k.to(wide)[:, :, None].mT
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    # Where nothing is seen even NaN and infinity of a value must not matter, so zeros are not multiplied by them.
    values = v.to(wide)[:, :, None]
    out = weights @ values if torch.isfinite(values).all() else _product_of_seen(weights, values, seen)
    return out.flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _product_of_seen(weights: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen[..., None], weights[..., None] * values[..., None, :, :], 0.0).sum(-2)


def block_sparse_attention_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v.

    With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dLSE), dQ = scale dS K, dK = scale dS^T Q.
    """
    grad, grad_lse, q, k, v, block_map, out, lse, block_q, block_k, scale = args
    groups = k.size(1)
    wide = torch.promote_types(q.dtype, torch.float32)
    qg, og, gg = (t.to(wide).unflatten(1, (groups, -1)) for t in (q, out, grad))
    kg, vg = k.to(wide)[:, :, None], v.to(wide)[:, :, None]
    seen = expand_map(block_map, block_q, block_k, q.size(2), k.size(2)).unflatten(1, (groups, -1))
    lse_g = lse.masked_fill(lse == -torch.inf, 0.0).unflatten(1, (groups, -1))[..., None]
    weights = (scale * qg @ kg.mT - lse_g).masked_fill(~seen, -torch.inf).exp()
    delta = (gg * og).sum(-1) - grad_lse.to(wide).unflatten(1, (groups, -1))
    d_scores = weights * (gg @ vg.mT - delta[..., None])
    dq = (scale * d_scores @ kg).flatten(1, 2).to(q.dtype)
    dk = (scale * d_scores.mT @ qg).sum(2).to(k.dtype)
    dv = (weights.mT @ gg).sum(2).to(v.dtype)
    return dq, dk, dv

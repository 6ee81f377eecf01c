"""Neighborhood attention in plain PyTorch: a dense mask and a softmax.

Time and memory grow with the square of the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eff_kernels.ops.neighborhood_attention.args import Args, BackwardArgs
from eff_kernels.ops.neighborhood_attention.common import neighborhood_mask


def neighborhood_attention(*args: *Args) -> tuple[Tensor, Tensor]:
    """Softmax over the window and the additional keys; also its logarithm of the sum of exponentials."""
    query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values = args
    shape = query.shape[1:-2]
    q, k, v = _heads_first(query), _heads_first(key, additional_keys), _heads_first(value, additional_values)
    scores = _scores(q, k, shape, (kernel_size, stride, dilation, is_causal), scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    out = (weights @ v[:, :, None]).flatten(1, 2)
    lse = lse.flatten(1, 2).mT.reshape(query.shape[:-1])
    out = out.transpose(1, 2).reshape(*query.shape[:-1], value.size(-1))
    return out.to(query.dtype).contiguous(), lse.contiguous()


def neighborhood_attention_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value and the additional keys and values.

    With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dLSE), dQ = scale dS K, dK = scale dS^T Q.
    """
    grad, grad_lse, query, key, value, out, lse = args[:7]
    kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values = args[7:]
    shape, groups = query.shape[1:-2], key.size(-2)
    q, k, v = _heads_first(query), _heads_first(key, additional_keys), _heads_first(value, additional_values)
    q = q.unflatten(1, (groups, -1))
    d_out = _heads_first(grad).unflatten(1, (groups, -1))
    delta = (d_out * _heads_first(out).unflatten(1, (groups, -1))).sum(-1) - _rows(grad_lse, groups)
    scores = _scores(q.flatten(1, 2), k, shape, (kernel_size, stride, dilation, is_causal), scale)
    weights = (scores - _rows(lse, groups)[..., None]).exp()
    d_scores = weights * (d_out @ v[:, :, None].mT - delta[..., None])
    d_q = (scale * d_scores @ k[:, :, None]).flatten(1, 2).transpose(1, 2).reshape(query.shape)
    d_k = (scale * d_scores.mT @ q).sum(2).transpose(1, 2)
    d_v = (weights.mT @ d_out).sum(2).transpose(1, 2)
    n = math.prod(shape)
    gradients = (
        d_q.to(query.dtype),
        d_k[:, :n].reshape(key.shape).to(key.dtype),
        d_v[:, :n].reshape(value.shape).to(value.dtype),
        d_k[:, n:].to(key.dtype),
        d_v[:, n:].to(value.dtype),
    )
    return tuple(g.clone(memory_format=torch.contiguous_format) for g in gradients)


def _heads_first(x: Tensor, additional: Tensor | None = None) -> Tensor:
    """[B, heads, tokens, D] in float32 or float64, with additional tokens at the end."""
    x = x.flatten(1, -3)
    if additional is not None:
        x = torch.cat([x, additional], 1)
    return x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))


def _rows(x: Tensor, groups: int) -> Tensor:
    """[B, *shape, heads] as [B, groups, heads of a group, tokens]."""
    return x.flatten(1, -2).mT.unflatten(1, (groups, -1))


def _scores(q: Tensor, k: Tensor, shape: Sequence[int], windows: tuple[Any, ...], scale: float) -> Tensor:
    """[B, groups, heads of a group, tokens, keys], minus infinity outside of the windows."""
    mask = neighborhood_mask(shape, *windows)
    mask = torch.cat([mask, mask.new_ones(mask.size(0), k.size(2) - mask.size(1))], 1).to(q.device)
    scores = scale * q.unflatten(1, (k.size(1), -1)) @ k[:, :, None].mT
    return scores.masked_fill(~mask, -torch.inf)

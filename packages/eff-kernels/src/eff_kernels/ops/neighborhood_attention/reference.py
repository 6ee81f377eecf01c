"""Neighborhood attention in plain PyTorch: a dense mask and a softmax.

Time and memory grow with the square of the number of tokens. The windows follow Hassani et al. (arXiv 2403.04690), with
dilation (2209.15001) and strides (2504.16922).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def window_bounds(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """First and last key of each query's window on one axis.

    The axis falls into ``dilation`` interleaved sequences, and a query sees keys of its own alone: every
    ``dilation``-th key from the first to the last. At the ends a window is moved inwards, never cut. The ``stride``
    neighbouring queries of a stride group share the window of their leader. A causal window ends at the query itself,
    and is cut where there are too few keys before it.

    Args:
        length: Number of positions on the axis.
        window: Number of keys that a query sees.
        stride: Size of a stride group.
        dilation: Distance between the keys of a window.
        causal: Whether keys after the query are out of sight.

    Returns:
        Two int64 tensors [length]: indices of the first and of the last key.
    """
    index = torch.arange(length)
    residue, place = index % dilation, index // dilation
    count = (length - residue + dilation - 1) // dilation  # positions in the query's own sequence
    group = place // stride * stride
    if causal:
        leader = torch.minimum(group + stride - 1, count - 1)
        first, last = (leader - window + 1).clamp(min=0), place
    else:
        leader = torch.minimum(group + stride // 2, count - 1)
        first = torch.minimum((leader - window // 2).clamp(min=0), count - window)
        last = first + window - 1
    return first * dilation + residue, last * dilation + residue


def neighborhood_mask(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Tensor:
    """Which key each query sees, bool [N, N] over the N tokens of a map in row-major order.

    A key is seen if it lies in the window on every axis, so that the mask is the Kronecker product of one mask an axis.

    Args:
        shape: Lengths of the axes.
        kernel_size: Keys in the window, on each axis; see `window_bounds` for this and the others.
        stride: Size of a stride group, on each axis.
        dilation: Distance between keys, on each axis.
        is_causal: Whether keys after the query are out of sight, on each axis.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, window, step, spacing, causal in zip(shape, kernel_size, stride, dilation, is_causal, strict=True):
        first, last = (bound[:, None] for bound in window_bounds(length, window, step, spacing, causal))
        key = torch.arange(length)
        seen = (key >= first) & (key <= last) & ((key - first) % spacing == 0)
        mask = torch.kron(mask, seen)
    return mask


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    additional_keys: Tensor,
    additional_values: Tensor,
) -> tuple[Tensor, Tensor]:
    """Softmax over the window and the additional keys; also its logarithm of the sum of exponentials."""
    shape = query.shape[1:-2]
    q, k, v = _heads_first(query), _heads_first(key, additional_keys), _heads_first(value, additional_values)
    scores = _scores(q, k, shape, (kernel_size, stride, dilation, is_causal), scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    out = (weights @ v[:, :, None]).flatten(1, 2)
    lse = lse.flatten(1, 2).mT.reshape(query.shape[:-1])
    out = out.transpose(1, 2).reshape(*query.shape[:-1], value.size(-1))
    return out.to(query.dtype).contiguous(), lse.contiguous()


def neighborhood_attention_backward(
    grad: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
    scale: float,
    additional_keys: Tensor,
    additional_values: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value and the additional keys and values.

    With P the weights: dV = P^T dO, dS = P (dO V^T - rowsum(dO O) + dLSE), dQ = scale dS K, dK = scale dS^T Q.
    """
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


@functools.lru_cache(maxsize=16)
def window_index(
    shape: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """Flat index of each key of each window, int64 [slots, N], and whether the slot holds a key, bool [slots, N].

    A slot without a key has the index of the query itself.
    """
    index, there = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for length, window, step, spacing, causal in zip(shape, kernel_size, stride, dilation, is_causal, strict=True):
        first, last = window_bounds(length, window, step, spacing, causal)
        key = first + spacing * torch.arange(window)[:, None]
        inside = key <= last
        key = torch.where(inside, key, torch.arange(length))
        index = (index[:, None, :, None] * length + key[None, :, None, :]).flatten(2).flatten(0, 1)
        there = (there[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
    return index, there

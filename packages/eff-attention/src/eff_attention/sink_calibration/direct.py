"""The look at calls that are plain causal attention, in few passes over few numbers; `measure.look` takes all others.

A prompt is read in blocks of queries with the keys up to the last of them. Of a single query, which sees all keys, the
weights are kept: they are all that calibration needs.
"""

from __future__ import annotations

import torch
from eff_kernels.edit.attention import AttentionCall
from torch import Tensor

_BLOCK = 128  # queries


def is_plain(call: AttentionCall) -> bool:
    """Whether each query sees the keys up to its own and nothing else acts on the logits."""
    more = (call.mask, call.softcap, call.sinks, call.bias, call.window)
    if any(x is not None for x in more) or call.dropout or call.edits or call.q.shape[0] != call.k.shape[0]:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v)):
        return False
    last = call.offset + call.num_queries
    return last == call.num_keys if call.causal else call.num_queries == 1


def weights_of_one(call: AttentionCall, heads: tuple[int, ...]) -> Tensor:
    """Weights [B, h, 1, S] of a call with one query."""
    with torch.autocast(call.q.device.type, enabled=False):
        return (_products(call, heads, slice(None), call.num_keys) * call.scale).softmax(-1)


def output_of_one(call: AttentionCall, weights: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Output [B, h, 1, Dv] of weights [B, h, 1, S] of some heads."""
    with torch.autocast(call.q.device.type, enabled=False):
        value = call.v.to(weights.dtype)
        if len(heads) == call.num_heads:
            grouped = weights.reshape(weights.shape[0], value.shape[1], -1, weights.shape[-1]) @ value
            return grouped.reshape(*weights.shape[:3], -1).to(call.dtype)
        group = call.num_heads // call.num_kv_heads
        return (weights @ value[:, [h // group for h in heads]]).to(call.dtype)


def sums_and_lse(call: AttentionCall, heads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Weight of each key from all queries [B, h, S], and the log-sum-exp of each query [B, h, Sq]."""
    batch, count = call.q.shape[0], call.num_queries
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    sums = torch.zeros(batch, len(heads), call.num_keys, dtype=dtype, device=call.q.device)
    found = []
    with torch.autocast(call.q.device.type, enabled=False):
        for start in range(0, count, _BLOCK):
            stop = min(count, start + _BLOCK)
            size, end = stop - start, call.num_keys - count + stop
            scores = _products(call, heads, slice(start, stop), end).mul_(call.scale)
            hidden = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
            scores[..., end - size :].masked_fill_(hidden, -torch.inf)
            top = scores.amax(-1, keepdim=True)
            scores.sub_(top).exp_()
            total = scores.sum(-1)
            found.append(top[..., 0] + total.log())
            sums[..., :end] += (total.reciprocal()[:, :, None] @ scores)[:, :, 0]
    return sums, torch.cat(found, 2)


def _products(call: AttentionCall, heads: tuple[int, ...], rows: slice, end: int) -> Tensor:
    """Queries times the first ``end`` keys, float32 or float64 [B, h, q, end]."""
    dtype = torch.float64 if call.dtype == torch.float64 else torch.float32
    query, key = call.q[:, :, rows].to(call.dtype).to(dtype), call.k[:, :, :end].to(call.dtype).to(dtype)
    batch, total, size = query.shape[0], call.num_heads, query.shape[2]
    if len(heads) == total:
        grouped = query.reshape(batch, call.num_kv_heads, -1, query.shape[-1]) @ key.mT
        return grouped.reshape(batch, total, size, end)
    group = total // call.num_kv_heads
    return query[:, list(heads)] @ key[:, [h // group for h in heads]].mT

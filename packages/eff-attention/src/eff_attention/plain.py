"""Calls that are plain causal attention, and those of one query among them, whose weights are few."""

from __future__ import annotations

import torch
from eff_kernels import row_scores, row_values
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput
from torch import Tensor


def obstacles(call: AttentionCall) -> str:
    """What a call has beside a mask that its plain computation does not know; empty if there is nothing."""
    names = [n for n in ("softcap", "sinks", "bias", "window") if getattr(call, n) is not None]
    names += [n for n in ("dropout", "edits", "wants_weights") if getattr(call, n)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v)):
        names.append("gradients")
    return ", ".join(names)


def is_plain(call: AttentionCall) -> bool:
    """Whether each query sees the keys up to its own and nothing else acts on the logits."""
    if call.mask is not None or call.q.shape[0] != call.k.shape[0] or obstacles(call):
        return False
    return call.offset + call.num_queries == call.num_keys if call.causal else call.num_queries == 1


def is_one(call: AttentionCall, attend: Attend) -> bool:
    """Whether a rule may answer a call by itself: it has one query, is plain, and nobody else looks on."""
    return call.num_queries == 1 and attend.alone and is_plain(call)


def scores_of_one(call: AttentionCall) -> Tensor:
    """Logits [B, H, S] of a plain call of one query, float32, or float64 for float64 calls."""
    return row_scores(alike(call, call.q)[:, :, 0], alike(call, call.k), call.scale)


def answer_of_one(call: AttentionCall, weights: Tensor) -> AttentionOutput:
    """The output of such a call from weights [B, H, S]."""
    return AttentionOutput(row_values(weights, alike(call, call.v), call.dtype)[:, :, None])


def alike(call: AttentionCall, x: Tensor) -> Tensor:
    """What attention gets of it, which autocast may have made narrower."""
    return x if x.dtype is call.dtype else x.to(call.dtype)

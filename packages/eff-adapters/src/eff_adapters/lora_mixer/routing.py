"""From hidden states to the gates of experts: pure functions. E experts, N tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Routes(NamedTuple):
    """The experts of each token, ids int64 [N, k], and their gates [N, k], which sum to 1."""

    ids: Tensor
    gates: Tensor


def router_logits(x: Tensor, weight: Tensor, present: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Logits [N, E] of x [N, d] and a router [E, d], in float32 (float64 for float64 inputs), whatever autocast says.

    In 16 bit, experts of nearly the same logit would tie. Experts that are not ``present`` (bool [E]) get -inf.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.to(wide), weight.to(wide))
    else:
        logits = F.linear(x.to(wide), weight.to(wide))
    if temperature != 1.0:
        logits = logits / temperature
    return logits if present is None else logits.masked_fill(~present, -torch.inf)


def top_routes(logits: Tensor, top_k: int) -> Routes:
    """The ``top_k`` most probable experts, with probabilities that are renormalised among them.

    softmax over the largest logits is p_e / (sum of the largest p), without the others.
    """
    best = logits.topk(top_k, dim=-1)
    return Routes(best.indices, best.values.softmax(-1))


def sparse_gates(probs: Tensor, top_k: int) -> Tensor:
    """Gates [..., E]: the ``top_k`` largest of probs [..., E], renormalised; the others 0."""
    best = probs.topk(top_k, dim=-1)
    kept = best.values / best.values.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(-1, best.indices, kept)


def straight_through_gates(probs: Tensor, top_k: int) -> Tensor:
    """`sparse_gates` in the forward, the gradient of ``probs`` in the backward."""
    return sparse_gates(probs.detach(), top_k) + (probs - probs.detach())


def dense_update(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> Tensor:
    """All experts as two products: out[n] = sum_e gates[n, e] b[e] a[e] x[n], [N, out].

    x is [N, d], a [E, R, d], b [E, out, R]. The gates [N, E] hold the scaling alpha / r too.
    """
    num_experts, rank, _ = a.shape
    low = F.linear(x.to(a.dtype), a.flatten(0, 1)).unflatten(-1, (num_experts, rank))
    gated = (low * gates.to(torch.promote_types(low.dtype, torch.float32))[..., None]).to(b.dtype)
    return F.linear(gated.flatten(-2), b.transpose(0, 1).flatten(1))

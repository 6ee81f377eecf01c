"""Taylor attention in plain PyTorch: the quadratic form, and the feature map of the linear one.

The polynomial 1 + s + s^2 / 2 of s = x . y is the product f(x) . f(y) of the features f(x) = [1, x_a, x_a^2 / sqrt 2,
x_a x_b for a < b]: F = 1 + D + D (D + 1) / 2 of them, half of what the outer product x x^T has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.taylor_linear_attention.args import Args, BackwardArgs
from eff_kernels.ops.taylor_linear_attention.common import (
    features,
    features_backward,
    final_state,
    numerator_gradient,
    safe,
    with_ones,
)


def taylor_linear_attention(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normaliser and state; ``chunk_size`` has no say here."""
    q, k, v, key_mask, _, scale, state, return_state = args
    q_wide, k_wide, ones_v, more = _widen(q, k, v, key_mask, scale, state)
    weight, _ = _weights(q_wide, k_wide)
    total = weight @ ones_v
    if more is not None:
        total = total + features(q_wide).mT @ more
    norm = total[..., -1]
    out = (total[..., :-1] / safe(norm).unsqueeze(-1)).to(q.dtype)
    groups = q.size(1) // k.size(1)
    return out, norm.detach().clone(), final_state(k_wide[:, ::groups], ones_v[:, ::groups], state, return_state)


def taylor_linear_attention_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v."""
    grad, q, k, v, out, norm, key_mask, _, scale, state = args
    q_wide, k_wide, ones_v, more = _widen(q, k, v, key_mask, scale, state)
    weight, score = _weights(q_wide, k_wide)
    g = numerator_gradient(grad, out, norm)
    dscore = (g @ ones_v.mT * (1 + score)).tril()
    dq, dk, dv = dscore @ k_wide, dscore.mT @ q_wide, (weight.mT @ g)[..., :-1]
    if more is not None:
        dq = dq + features_backward(q_wide, more @ g.mT)
    if key_mask is not None:
        dv = dv * key_mask[:, None, :, None]
    shape = (k.size(1), q.size(1) // k.size(1))
    dk, dv = (t.unflatten(1, shape).sum(2) for t in (dk, dv))
    return (dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _widen(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Scaled queries, and keys, values and state for each query head."""
    wide, groups = torch.promote_types(q.dtype, torch.float32), q.size(1) // k.size(1)
    keys, values = k.to(wide).repeat_interleave(groups, 1), with_ones(v.to(wide), key_mask).repeat_interleave(groups, 1)
    return q.to(wide) * scale, keys, values, None if state is None else state.to(wide).repeat_interleave(groups, 1)


def _weights(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The polynomial of the scores up to each query, and the scores."""
    score = q @ k.mT
    return (1 + score + score.square() / 2).tril(), score

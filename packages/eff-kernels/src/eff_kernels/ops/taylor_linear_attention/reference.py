"""Taylor attention in plain PyTorch: the quadratic form, and the feature map of the linear one.

The polynomial 1 + s + s^2 / 2 of s = x . y is the product f(x) . f(y) of the features f(x) = [1, x_a, x_a^2 / sqrt 2,
x_a x_b for a < b]: F = 1 + D + D (D + 1) / 2 of them, half of what the outer product x x^T has.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def num_features(d: int) -> int:
    """Length of f(x) for x of length ``d``."""
    return 1 + d + d * (d + 1) // 2


def taylor_state_shape(k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """Shape [B, Hkv, F, Dv + 1] of the state: sum of f(k) v^T, and in the last column the sum of f(k)."""
    return k.size(0), k.size(1), num_features(k.size(-1)), v.size(-1) + 1


def taylor_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    chunk_size: int,
    scale: float,
    state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, normaliser and state; ``chunk_size`` has no say here."""
    q_wide, k_wide, ones_v, more = _widen(q, k, v, key_mask, scale, state)
    weight, _ = _weights(q_wide, k_wide)
    total = weight @ ones_v
    if more is not None:
        total = total + features(q_wide).mT @ more
    norm = total[..., -1]
    out = (total[..., :-1] / safe(norm).unsqueeze(-1)).to(q.dtype)
    groups = q.size(1) // k.size(1)
    return out, norm.detach().clone(), final_state(k_wide[:, ::groups], ones_v[:, ::groups], state, return_state)


def taylor_linear_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norm: Tensor,
    key_mask: Tensor | None,
    chunk_size: int,
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v."""
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


def numerator_gradient(grad: Tensor, out: Tensor, norm: Tensor) -> Tensor:
    """Gradient [..., Dv + 1] to numerator and normaliser from that to their quotient."""
    wide, inverse = grad.to(norm.dtype), torch.where(norm == 0, 0, 1 / safe(norm)).unsqueeze(-1)
    return torch.cat([wide * inverse, -(wide * out).sum(-1, keepdim=True) * inverse], -1)


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


def features(x: Tensor) -> Tensor:
    """f(x) for x [..., T, D], with the features along rows: [..., F, T]."""
    columns = x.mT.contiguous()
    i, j = pairs(x.size(-1), x.device)
    second = columns.index_select(-2, i) * columns.index_select(-2, j)
    second[..., : x.size(-1), :] *= 0.5**0.5
    return torch.cat([torch.ones_like(columns[..., :1, :]), columns, second], -2)


def features_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient [..., T, D] to x from the gradient [..., F, T] to f(x)."""
    columns, d = x.mT.contiguous(), x.size(-1)
    i, j = pairs(d, x.device)
    second = grad[..., 1 + d :, :].clone()
    second[..., :d, :] *= 0.5**0.5
    result = grad[..., 1 : 1 + d, :].clone()
    result.index_add_(-2, i, second * columns.index_select(-2, j))
    result.index_add_(-2, j, second.mul_(columns.index_select(-2, i)))
    return result.mT


@functools.lru_cache(maxsize=32)
def pairs(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices a <= b of the products x_a x_b: first those with a = b."""
    i, j = torch.triu_indices(d, d, 1).unbind()
    same = torch.arange(d)
    return torch.cat([same, i]).to(device), torch.cat([same, j]).to(device)


def with_ones(v: Tensor, key_mask: Tensor | None) -> Tensor:
    """[v, 1], and zeros where the mask [B, T] hides a key: numerator and normaliser in one product."""
    both = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    return both if key_mask is None else torch.where(key_mask[:, None, :, None], both, 0)


def safe(norm: Tensor) -> Tensor:
    """The normaliser, and 1 where there was no key to see (a weight is never below 1/2)."""
    return torch.where(norm == 0, 1, norm)


def final_state(k: Tensor, ones_v: Tensor, state: Tensor | None, wanted: bool) -> Tensor:
    """State after all tokens, or an empty tensor; it carries no gradient."""
    if not wanted:
        return k.new_empty(0)
    with torch.no_grad():
        more = features(k) @ ones_v
        return more if state is None else more + state.to(more.dtype)

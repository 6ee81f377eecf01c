"""Features, states and normalisers that the backends share."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def taylor_state_shape(k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """Shape [B, Hkv, F, Dv + 1] of the state: sum of f(k) v^T, and in the last column the sum of f(k)."""
    return k.size(0), k.size(1), num_features(k.size(-1)), v.size(-1) + 1


def numerator_gradient(grad: Tensor, out: Tensor, norm: Tensor) -> Tensor:
    """Gradient [..., Dv + 1] to numerator and normaliser from that to their quotient."""
    wide, inverse = grad.to(norm.dtype), torch.where(norm == 0, 0, 1 / safe(norm)).unsqueeze(-1)
    return torch.cat([wide * inverse, -(wide * out).sum(-1, keepdim=True) * inverse], -1)


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


def num_features(d: int) -> int:
    """Length of f(x) for x of length ``d``."""
    return 1 + d + d * (d + 1) // 2

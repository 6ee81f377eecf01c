"""The linear branch in batched matrix products, on any device.

With A the pairs of blocks in scope, S_j = phi(K_j)^T V_j and z_j = phi(K_j)^T 1 for a block of keys:

    H_i = sum_j A_ij S_j,  Z_i = sum_j A_ij z_j,  O_i = phi(Q_i) H_i / phi(Q_i) Z_i

The sums over j are one more matrix product, and direct for every scope: taking the critical blocks from the total, as
the paper's kernel does, would save little and cancel digits.

N: heads of keys of the batch. G: query heads of one. Tm, Tn: blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_kernels.ops.sparse_linear_attention.common import feature, feature_backward, in_scope

_STATES = 2**24  # elements of the S and H that are in memory together


class _Heads(NamedTuple):
    """Some heads, in float32 and in blocks."""

    at: slice
    scope: Tensor  # A, [N, G * Tm, Tn]
    q: Tensor  # [N, G, L, D]
    k: Tensor  # [N, Lk, D]
    phi_q: Tensor  # [N, G * Tm, block_q, D]
    phi_k: Tensor  # [N, Tn, block_k, D]
    v: Tensor  # [N, Tn, block_k, Dv]
    h: Tensor  # [N, G * Tm, D, Dv]
    z: Tensor  # [N, G * Tm, D, 1]
    weight: Tensor  # phi(Q) Z, [N, G * Tm, block_q, 1]; 1 where it is 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, feature_map: str, linear_scope: str
) -> Tensor:
    """The output of the branch, [B, H, L, Dv] like q."""
    out = q.new_empty(*q.shape[:-1], v.size(-1))
    if q.numel() == 0 or v.numel() == 0:
        return out.zero_()
    to = out.view(-1, q.size(1) // k.size(1), *out.shape[2:])
    for x in _heads(q, k, v, mask, block_q, block_k, feature_map, linear_scope):
        to[x.at] = _rows((x.phi_q @ x.h).div_(x.weight), x.q)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    out: Tensor,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear_scope: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v, in float32; see the reference for the formulas."""
    dq, dk, dv = (torch.empty(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, v))
    if q.numel() == 0 or v.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    group = q.size(1) // k.size(1)
    to_q, to_k, to_v = dq.view(-1, group, *q.shape[2:]), dk.view(-1, *k.shape[2:]), dv.view(-1, *v.shape[2:])
    grads, outs = (t.reshape(-1, group, *t.shape[2:]) for t in (grad, out))
    if linear_scope == "all":
        block_q = q.size(2)
    for x in _heads(q, k, v, mask, block_q, block_k, feature_map, linear_scope):
        g = grads[x.at].float()
        delta = _blocks((g * outs[x.at].float()).sum(-1, keepdim=True), block_q).flatten(1, 2)
        dn = _blocks(g, block_q).flatten(1, 2) / x.weight
        dw = delta.div_(x.weight).neg_()
        d_phi = _rows((dn @ x.h.mT).addcmul_(dw, x.z.mT), x.q)
        to_q[x.at] = feature_backward(d_phi, x.q, _rows(x.phi_q, x.q), feature_map)
        d_s = (x.scope.mT @ (x.phi_q.mT @ dn).flatten(2)).unflatten(2, x.h.shape[2:])
        d_z = x.scope.mT @ (x.phi_q.mT @ dw)[..., 0]
        d_phi = _tokens((x.v @ d_s.mT).add_(d_z[:, :, None]), x.k)
        to_k[x.at] = feature_backward(d_phi, x.k, _tokens(x.phi_k, x.k), feature_map)
        to_v[x.at] = _tokens(x.phi_k @ d_s, x.k)
    return dq, dk, dv


def _heads(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, feature_map: str, linear_scope: str
) -> Iterator[_Heads]:
    """All heads, as many at a time as keeps the states small."""
    group = q.size(1) // k.size(1)
    scope = in_scope(mask, linear_scope)
    if linear_scope == "all":  # one block of everything
        block_q, block_k = q.size(2), k.size(2)
        scope = scope.new_ones(*q.shape[:2], 1, 1)
    scope = scope.reshape(-1, group * scope.size(2), scope.size(3))
    queries, keys, values = q.reshape(-1, group, *q.shape[2:]), k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:])
    step = max(1, _STATES // max(1, sum(scope.shape[1:]) * k.size(-1) * v.size(-1)))
    for first in range(0, len(keys), step):
        at = slice(first, first + step)
        a, one_q, one_k = scope[at].float(), queries[at].float(), keys[at].float()
        phi_q = _blocks(feature(one_q, feature_map), block_q).flatten(1, 2)
        phi_k, one_v = _blocks(feature(one_k, feature_map), block_k), _blocks(values[at].float(), block_k)
        s, z = phi_k.mT @ one_v, phi_k.sum(2)
        # A product with 0 would carry NaN and infinity to query blocks that do not see them.
        bad = ~(s.sum((2, 3)) + z.sum(2)).isfinite()
        s, z = s.masked_fill_(bad[..., None, None], 0), z.masked_fill_(bad[..., None], 0)
        sees_bad = (a @ bad.float()[..., None]) > 0
        h = (a @ s.flatten(2)).masked_fill_(sees_bad, torch.nan).unflatten(2, s.shape[2:])
        sums = (a @ z)[..., None]
        weight = phi_q @ sums
        yield _Heads(at, a, one_q, one_k, phi_q, phi_k, one_v, h, sums, weight.masked_fill_(weight == 0, 1))


def _blocks(x: Tensor, block: int) -> Tensor:
    """[..., length, n] as [..., T, block, n], with zeros after the last row."""
    missing = -x.size(-2) % block
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.unflatten(-2, (x.size(-2) // block, block))


def _rows(x: Tensor, q: Tensor) -> Tensor:
    """[N, G * Tm, block, n] as [N, G, L, n]."""
    return x.reshape(*q.shape[:2], -1, x.size(-1))[:, :, : q.size(2)]


def _tokens(x: Tensor, k: Tensor) -> Tensor:
    """[N, Tn, block, n] as [N, Lk, n]."""
    return x.flatten(1, 2)[:, : k.size(1)]

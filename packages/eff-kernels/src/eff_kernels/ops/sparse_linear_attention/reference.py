"""Sparse-linear attention in plain PyTorch: one query block after another, from the formulas of arXiv 2509.24006."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("softmax", "elu", "relu")
LINEAR_SCOPES = ("marginal", "noncritical", "all")


def feature(x: Tensor, name: str) -> Tensor:
    """The feature map phi: softmax over the features, elu + 1, or relu."""
    if name == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if name == "elu" else x.relu()


def feature_backward(grad: Tensor, x: Tensor, y: Tensor, name: str) -> Tensor:
    """Gradient of phi at x, where y = phi(x)."""
    if name == "softmax":
        return y * (grad - (grad * y).sum(-1, keepdim=True))
    return grad * torch.where(x > 0, 1, y) if name == "elu" else grad * (x > 0)


def in_scope(mask: Tensor, linear_scope: str) -> Tensor:
    """Which blocks the linear branch takes: those of class 0 in the paper, or all but the critical, or all."""
    if linear_scope == "all":
        return torch.ones_like(mask, dtype=torch.bool)
    return mask == 0 if linear_scope == "marginal" else mask <= 0


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear_scope: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse and linear branch, and the logarithm of the sum of exponentials of the sparse one."""
    wide = torch.promote_types(q.dtype, torch.float32)
    found = []
    for b, h, rows, near, far in _walk(q, k, mask, block_q, block_k, linear_scope):
        kv = h // (q.size(1) // k.size(1))
        one, keys, values = q[b, h, rows].to(wide), k[b, kv].to(wide), v[b, kv].to(wide)
        scores = scale * one @ keys[near].mT
        lse = scores.logsumexp(-1)
        sparse = scores.softmax(-1) @ values[near]
        phi_q, phi_k = feature(one, feature_map), feature(keys[far], feature_map)
        # O = phi(Q) H / phi(Q) Z with H = phi(K)^T V, Z = phi(K)^T 1
        weight = phi_q @ phi_k.sum(0)[:, None]
        linear = phi_q @ (phi_k.mT @ values[far]) / torch.where(weight == 0, 1, weight)
        found.append((sparse, linear, lse))
    shape = q.shape[:-1]
    if not found:  # no query; the graph still reaches the inputs
        nothing = 0 * (q.sum() + k.sum() + v.sum())
        lse = torch.zeros(shape, dtype=wide, device=q.device) + nothing
        return q.new_zeros(*shape, v.size(-1)) + nothing, q.new_zeros(*shape, v.size(-1)) + nothing, lse
    sparse, linear, lse = (torch.cat(parts).view(*shape, *parts[0].shape[1:]) for parts in zip(*found, strict=True))
    return sparse.to(q.dtype), linear.to(q.dtype), lse


def sparse_linear_attention_backward(
    grad_sparse: Tensor,
    grad_linear: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    sparse: Tensor,
    linear: Tensor,
    lse: Tensor,
    block_q: int,
    block_k: int,
    feature_map: str,
    linear_scope: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v.

    With P the weights, A = phi(Q), w = A Z, and V+ and H+ with a column of ones and the column Z:
        dS = P (dO V^T - rowsum(dO O) + dLSE),     dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO
        dN+ = [dO / w, -rowsum(dO O) / w],         dA = dN+ H+^T,    dH+ = A^T dN+,
        dphi(K) = V+ dH+^T,                        dV = phi(K) dH
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    for b, h, rows, near, far in _walk(q, k, mask, block_q, block_k, linear_scope):
        kv = h // (q.size(1) // k.size(1))
        one, keys, values = q[b, h, rows].to(wide), k[b, kv].to(wide), v[b, kv].to(wide)
        grad = grad_sparse[b, h, rows].to(wide)
        delta = (grad * sparse[b, h, rows].to(wide)).sum(-1) - grad_lse[b, h, rows]
        weights = (scale * one @ keys[near].mT - lse[b, h, rows][:, None]).exp()
        d_scores = scale * weights * (grad @ values[near].mT - delta[:, None])
        dq[b, h, rows] = d_scores @ keys[near]
        dk[b, kv, near] += d_scores.mT @ one
        dv[b, kv, near] += weights.mT @ grad

        phi_q, phi_k = feature(one, feature_map), feature(keys[far], feature_map)
        ones = F.pad(values[far], (0, 1), value=1.0)
        h_plus = phi_k.mT @ ones
        weight = phi_q @ h_plus[:, -1:]
        weight = torch.where(weight == 0, 1, weight)
        grad = grad_linear[b, h, rows].to(wide)
        d_n = torch.cat([grad, -(grad * linear[b, h, rows].to(wide)).sum(-1, keepdim=True)], -1) / weight
        d_h = phi_q.mT @ d_n
        dq[b, h, rows] += feature_backward(d_n @ h_plus.mT, one, phi_q, feature_map)
        dk[b, kv, far] += feature_backward(ones @ d_h.mT, keys[far], phi_k, feature_map)
        dv[b, kv, far] += phi_k @ d_h[:, :-1]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _walk(
    q: Tensor, k: Tensor, mask: Tensor, block_q: int, block_k: int, linear_scope: str
) -> Iterator[tuple[int, int, slice, Tensor, Tensor]]:
    """For each query block: batch entry, head, rows, and the indices of its critical keys and of those in scope."""
    near, far = (m.repeat_interleave(block_k, -1)[..., : k.size(2)] for m in (mask > 0, in_scope(mask, linear_scope)))
    for b, h, i in itertools.product(*(range(n) for n in mask.shape[:3])):
        rows = slice(i * block_q, (i + 1) * block_q)
        yield b, h, rows, near[b, h, i].nonzero()[:, 0], far[b, h, i].nonzero()[:, 0]

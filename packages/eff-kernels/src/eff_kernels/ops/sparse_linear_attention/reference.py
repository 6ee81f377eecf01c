"""Sparse-linear attention in plain PyTorch: one query block after another, from the formulas of arXiv 2509.24006."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_kernels.ops.sparse_linear_attention.args import Args, BackwardArgs
from eff_kernels.ops.sparse_linear_attention.common import feature, feature_backward, in_scope


def sparse_linear_attention(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """Sparse and linear branch, and the logarithm of the sum of exponentials of the sparse one."""
    q, k, v, mask, block_q, block_k, feature_map, linear_scope, scale = args
    wide = torch.promote_types(q.dtype, torch.float32)
    found = []
    for b, h, rows, critical, marginal in _walk(q, k, mask, block_q, block_k, linear_scope):
        kv = h // (q.size(1) // k.size(1))
        one, keys, values = q[b, h, rows].to(wide), k[b, kv].to(wide), v[b, kv].to(wide)
        scores = scale * one @ keys[critical].mT
        lse = scores.logsumexp(-1)
        sparse = scores.softmax(-1) @ values[critical]
        phi_q, phi_k = feature(one, feature_map), feature(keys[marginal], feature_map)
        # O = phi(Q) H / phi(Q) Z with H = phi(K)^T V, Z = phi(K)^T 1
        weight = phi_q @ phi_k.sum(0)[:, None]
        linear = phi_q @ (phi_k.mT @ values[marginal]) / torch.where(weight == 0, 1, weight)
        found.append((sparse, linear, lse))
    shape = q.shape[:-1]
    if not found:  # no query; the graph still reaches the inputs
        nothing = 0 * (q.sum() + k.sum() + v.sum())
        lse = torch.zeros(shape, dtype=wide, device=q.device) + nothing
        return q.new_zeros(*shape, v.size(-1)) + nothing, q.new_zeros(*shape, v.size(-1)) + nothing, lse
    sparse, linear, lse = (torch.cat(parts).view(*shape, *parts[0].shape[1:]) for parts in zip(*found, strict=True))
    return sparse.to(q.dtype), linear.to(q.dtype), lse


def sparse_linear_attention_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v.

    With P the weights, A = phi(Q), w = A Z, and V+ and H+ with a column of ones and the column Z:
        dS = P (dO V^T - rowsum(dO O) + dLSE),     dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO
        dN+ = [dO / w, -rowsum(dO O) / w],         dA = dN+ H+^T,    dH+ = A^T dN+,
        dphi(K) = V+ dH+^T,                        dV = phi(K) dH
    """
    grad_sparse, grad_linear, grad_lse, q, k, v, mask, sparse, linear, lse = args[:10]
    block_q, block_k, feature_map, linear_scope, scale = args[10:]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
    for b, h, rows, critical, marginal in _walk(q, k, mask, block_q, block_k, linear_scope):
        kv = h // (q.size(1) // k.size(1))
        one, keys, values = q[b, h, rows].to(wide), k[b, kv].to(wide), v[b, kv].to(wide)
        grad = grad_sparse[b, h, rows].to(wide)
        delta = (grad * sparse[b, h, rows].to(wide)).sum(-1) - grad_lse[b, h, rows]
        weights = (scale * one @ keys[critical].mT - lse[b, h, rows][:, None]).exp()
        d_scores = scale * weights * (grad @ values[critical].mT - delta[:, None])
        dq[b, h, rows] = d_scores @ keys[critical]
        dk[b, kv, critical] += d_scores.mT @ one
        dv[b, kv, critical] += weights.mT @ grad

        phi_q, phi_k = feature(one, feature_map), feature(keys[marginal], feature_map)
        ones = F.pad(values[marginal], (0, 1), value=1.0)
        h_plus = phi_k.mT @ ones
        weight = phi_q @ h_plus[:, -1:]
        weight = torch.where(weight == 0, 1, weight)
        grad = grad_linear[b, h, rows].to(wide)
        d_n = torch.cat([grad, -(grad * linear[b, h, rows].to(wide)).sum(-1, keepdim=True)], -1) / weight
        d_h = phi_q.mT @ d_n
        dq[b, h, rows] += feature_backward(d_n @ h_plus.mT, one, phi_q, feature_map)
        dk[b, kv, marginal] += feature_backward(ones @ d_h.mT, keys[marginal], phi_k, feature_map)
        dv[b, kv, marginal] += phi_k @ d_h[:, :-1]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _walk(
    q: Tensor, k: Tensor, mask: Tensor, block_q: int, block_k: int, linear_scope: str
) -> Iterator[tuple[int, int, slice, Tensor, Tensor]]:
    """For each query block: batch entry, head, rows, and the indices of its critical keys and of those in scope."""
    critical, marginal = (
        m.repeat_interleave(block_k, -1)[..., : k.size(2)] for m in (mask > 0, in_scope(mask, linear_scope))
    )
    for b, h, i in itertools.product(*(range(n) for n in mask.shape[:3])):
        rows = slice(i * block_q, (i + 1) * block_q)
        yield b, h, rows, critical[b, h, i].nonzero()[:, 0], marginal[b, h, i].nonzero()[:, 0]

"""Sparse-linear attention as a function of q, k, v and a block map (section 3.2 of arXiv 2509.24006)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from eff_kernels import block_sparse_attention
from torch import Tensor

from eff_attention.sparse_linear.block_map import BlockMap
from eff_attention.sparse_linear.config import FeatureMap, LinearScope

_EPS = 1e-5  # of the denominator when the linear branch sees all keys, as in the official code


class SparseLinearOutput(NamedTuple):
    """The two branches.

    Attributes:
        sparse: Softmax attention over critical blocks, [B, H, Lq, Dv] of q's dtype.
        linear: Linear attention over the keys in scope, [B, H, Lq, Dv] of q's dtype; 0 where there are none.
        lse: Logarithm of the sum of the exponentials of the sparse branch, float32 [B, H, Lq].
    """

    sparse: Tensor
    linear: Tensor
    lse: Tensor

    def combine(self, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """``sparse + linear weight^T + bias``; the sparse branch alone without a weight."""
        if weight is None:
            return self.sparse
        added = F.linear(self.linear.to(weight.dtype), weight, bias)
        return (self.sparse + added).to(self.sparse.dtype)


def feature_map(x: Tensor, kind: FeatureMap) -> Tensor:
    """Map features to phi of linear attention over the last axis, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "softmax":
        return x.softmax(-1)
    return F.elu(x) + 1 if kind == "elu" else F.relu(x)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "marginal",
    scale: float | None = None,
    backend: str = "auto",
) -> SparseLinearOutput:
    """Both branches for a given map; see `SparseLinearOutput.combine` for their sum.

    Args:
        q: [B, H, Lq, D].
        k: [B, Hkv, Lk, D], H a multiple of Hkv.
        v: [B, Hkv, Lk, Dv].
        block_map: See `eff_attention.sparse_linear.block_map`.
        feature_map: phi of the linear branch, on q and k as they are.
        linear_scope: "marginal", "noncritical" or "all", see `SLAConfig`.
        scale: Factor of the scores of the sparse branch; D ** -0.5 by default.
        backend: Of `eff_kernels.block_sparse_attention`.
    """
    mask, block_q, block_k = block_map
    sparse, lse = block_sparse_attention(q, k, v, mask, block_q, block_k, scale, backend=backend)
    linear = linear_branch(q, k, v, block_map, feature_map=feature_map, linear_scope=linear_scope)
    return SparseLinearOutput(sparse, linear, lse)


def linear_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    feature_map: FeatureMap = "softmax",
    linear_scope: LinearScope = "marginal",
) -> Tensor:
    """phi(Q_i) H_i / phi(Q_i) Z_i with H_i, Z_i summed over the blocks of keys in scope of the block of query i.

    Products alone: phi(K_j)^T [V_j, 1] of each block of keys once, the sums over j as a product with the map, and one
    product for each block of queries. Float32 inside.
    """
    mask, block_q, block_k = block_map
    groups, length = k.size(1), q.size(2)
    phi_q, phi_k = _phi(q, feature_map), _phi(k, feature_map)
    ones = torch.ones(v.shape[:-1], dtype=phi_k.dtype, device=v.device)[..., None]
    values = torch.cat([v.to(phi_k.dtype), ones], -1)  # the last column gives Z
    if linear_scope == "all":
        state = (phi_k.mT @ values)[:, :, None]
        both = phi_q.unflatten(1, (groups, -1)) @ state
    else:
        scope = (mask == 0) if linear_scope == "marginal" else (mask <= 0)
        states = _blocks(phi_k, block_k).mT @ _blocks(values, block_k)  # [B, Hkv, Tn, D, Dv + 1]
        sums = scope.to(phi_k.dtype).unflatten(1, (groups, -1)) @ states.flatten(3)[:, :, None]
        both = _blocks(phi_q, block_q).unflatten(1, (groups, -1)) @ sums.unflatten(-1, states.shape[-2:])
        both = both.flatten(3, 4)[:, :, :, :length]
    numerator, denominator = both.flatten(1, 2).split([v.size(-1), 1], -1)
    if linear_scope == "all":
        return (numerator / (denominator + _EPS)).to(q.dtype)
    nothing = denominator == 0
    return (numerator / denominator.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0).to(q.dtype)


_phi = feature_map  # under another name where an argument hides it


def _blocks(x: Tensor, block: int) -> Tensor:
    """[B, H, L, D] as [B, H, L / block, block, D], with zeros at the end."""
    return F.pad(x, (0, 0, 0, -x.size(2) % block)).unflatten(2, (-1, block))

"""sparse_linear_attention: checks of the arguments, then dispatch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.sparse_linear_attention import cpu, reference
from eff_kernels.ops.sparse_linear_attention.args import Args, check
from eff_kernels.ops.sparse_linear_attention.autograd import backward, setup_context
from eff_kernels.ops.sparse_linear_attention.blocks import BlockMap


class SparseLinearOutput(NamedTuple):
    """What `sparse_linear_attention` returns.

    Attributes:
        sparse: Softmax attention over the critical blocks, [B, H, L, Dv] of the dtype of q; zero for a query block
            without one.
        linear: Linear attention over the blocks in scope, like ``sparse``; zero for a query block without one.
        lse: Natural logarithm of the sum of the exponentials of the critical scores, float32 [B, H, L]; with it results
            over different keys can be joined. Minus infinity for a query block without a critical key.
    """

    sparse: Tensor
    linear: Tensor
    lse: Tensor


def _allocate(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:-1], v.size(-1))
    return out, torch.empty_like(out), q.new_empty(q.shape[:-1], dtype=wide)


OP = Op(
    "sparse_linear_attention",
    schema_of(Args, "(Tensor, Tensor, Tensor)"),
    [
        Backend("cpu", cpu.sparse_linear_attention, cpu.reject),
        triton_backend("eff_kernels.ops.sparse_linear_attention.triton"),
        Backend("reference", reference.sparse_linear_attention),
    ],
    fake=_allocate,
    setup_context=setup_context,
    backward=backward,
)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_map: BlockMap,
    *,
    feature_map: str = "softmax",
    linear_scope: str = "marginal",
    scale: float | None = None,
    backend: str = "auto",
) -> SparseLinearOutput:
    """Attend exactly to the critical key blocks of each query block, and linearly to others.

    sparse[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j] over the keys j of critical blocks;
    linear[i] = phi(q[i]) . (sum_j phi(k[j]) v[j]^T) / phi(q[i]) . (sum_j phi(k[j])) over the keys j of blocks in scope.
    Sums are in float32. No mask, not causal. Differentiable in q, k and v through all three outputs.

    Args:
        q: [B, H, L, D].
        k: [B, Hkv, Lk, D] of the same dtype; H must be a multiple of Hkv, and query head h reads key-value head
            h // (H / Hkv).
        v: [B, Hkv, Lk, Dv].
        block_map: Classes of the pairs of blocks, from `block_map` or made by hand.
        feature_map: phi, "softmax" over the features, "elu" for elu + 1, or "relu"; it takes q and k unscaled.
        linear_scope: Blocks of the linear branch: "marginal", "noncritical" (marginal and negligible), or "all".
        scale: Factor of the scores; D ** -0.5 by default.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Raises:
        ValueError: shapes do not fit, or a name is unknown; the message has the value and what is wanted.
        TypeError: a dtype or a kind of tensor is not as stated.
        BackendError: the named backend cannot run this call; the message says why.
    """
    scale = (q.size(-1) ** -0.5 if q.dim() else 1.0) if scale is None else float(scale)
    args = (q, k, v, *block_map, feature_map, linear_scope, scale)
    check(*args)
    return SparseLinearOutput(*OP(*args, backend=backend))

"""Sparse-linear attention on the CPU: compiled block-sparse attention, and matrix products for the linear branch."""

from __future__ import annotations

from torch import Tensor

from eff_kernels.ops.block_sparse_attention import cpu as sparse_branch
from eff_kernels.ops.sparse_linear_attention import linear as linear_branch


def reject(q: Tensor, *args: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return sparse_branch.reject(q)


def reject_backward(grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor, q: Tensor, *args: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return sparse_branch.reject(q)


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
    """As the reference."""
    sparse, lse = sparse_branch.block_sparse_attention(q, k, v, mask, block_q, block_k, scale)
    return sparse, linear_branch.forward(q, k, v, mask, block_q, block_k, feature_map, linear_scope), lse


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
    """As the reference."""
    near = sparse_branch.block_sparse_attention_backward(
        grad_sparse, grad_lse, q, k, v, mask, sparse, lse, block_q, block_k, scale
    )
    far = linear_branch.backward(grad_linear, q, k, v, mask, linear, block_q, block_k, feature_map, linear_scope)
    return add(near, far)


def add(near: tuple[Tensor, Tensor, Tensor], far: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients through both branches."""
    dq, dk, dv = (b.add_(a).to(a.dtype) for a, b in zip(near, far, strict=True))
    return dq, dk, dv

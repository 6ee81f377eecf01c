"""Sparse-linear attention on the CPU: both branches compiled; matrix products for the gradients of the linear one."""

from __future__ import annotations

import struct

from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.block_sparse_attention import cpu as sparse_branch
from eff_kernels.ops.sparse_linear_attention import linear as linear_branch
from eff_kernels.ops.sparse_linear_attention.args import Args, BackwardArgs
from eff_kernels.ops.sparse_linear_attention.common import FEATURE_MAPS, LINEAR_SCOPES, add

_ARGS = struct.Struct("9q4P9q4qP")  # the fields of args in linear_attention.c
_kernel = native.loader("eff_linear_attention", _ARGS)


def reject(q: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(q)


def reject_backward(grad_sparse: Tensor, grad_linear: Tensor, grad_lse: Tensor, q: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(q)


def sparse_linear_attention(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    q, k, v, mask, block_q, block_k, feature_map, linear_scope, scale = args
    sparse, lse = sparse_branch.block_sparse_attention(q, k, v, mask, block_q, block_k, scale)
    return sparse, _linear(q, k, v, mask, block_q, block_k, feature_map, linear_scope), lse


def sparse_linear_attention_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    grad_sparse, grad_linear, grad_lse, q, k, v, mask, sparse, linear, lse = args[:10]
    block_q, block_k, feature_map, linear_scope, scale = args[10:]
    sparse_grads = sparse_branch.block_sparse_attention_backward(
        grad_sparse, grad_lse, q, k, v, mask, sparse, lse, block_q, block_k, scale
    )
    linear_grads = linear_branch.backward(
        grad_linear, q, k, v, mask, linear, block_q, block_k, feature_map, linear_scope
    )
    return add(sparse_grads, linear_grads)


def _linear(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block_q: int, block_k: int, feature_map: str, linear_scope: str
) -> Tensor:
    """The output of the linear branch."""
    out = q.new_empty(*q.shape[:-1], v.size(-1))
    if q.numel() == 0 or v.numel() == 0:
        return out.zero_()
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    mask = mask.contiguous()
    failed = _kernel()(_ARGS.pack(
        q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), block_q, block_k,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), mask.data_ptr(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        FEATURE_MAPS.index(feature_map), LINEAR_SCOPES.index(linear_scope), DTYPE_CODES[q.dtype],
        native.threads_for(q.numel() * q.size(3)), out.data_ptr(),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"sparse_linear_attention could not allocate scratch memory for q {list(q.shape)}")
    return out

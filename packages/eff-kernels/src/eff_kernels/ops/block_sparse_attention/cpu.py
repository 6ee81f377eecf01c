"""Block-sparse attention in compiled code."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.block_sparse_attention.args import Args, BackwardArgs

_ARGS = struct.Struct("9q4P9qd2q7P")  # the fields of args in block_sparse.c
_kernel = native.loader_by_name(_ARGS)


def reject(q: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(q)


def reject_backward(grad: Tensor, grad_lse: Tensor, q: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(q)


def block_sparse_attention(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference."""
    q, k, v, block_map, block_q, block_k, scale = args
    out = q.new_empty(*q.shape[:-1], v.size(-1))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    _call("eff_block_sparse", (q, k, v), block_map, block_q, block_k, scale, [out, lse], [])
    return out, lse


def block_sparse_attention_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference; the sums have a fixed order, whatever the number of threads."""
    grad, grad_lse, q, k, v, block_map, out, lse, block_q, block_k, scale = args
    gradients = [t.new_empty(t.shape) for t in (q, k, v)]
    given = [out.contiguous(), lse.contiguous(), grad.to(q.dtype).contiguous(), grad_lse.float().contiguous()]
    _call("eff_block_sparse_backward", (q, k, v), block_map, block_q, block_k, scale, given, gradients)
    return gradients[0], gradients[1], gradients[2]


def _call(
    name: str,
    tensors: Sequence[Tensor],
    block_map: Tensor,
    block_q: int,
    block_k: int,
    scale: float,
    given: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in tensors)
    block_map = block_map.contiguous()
    pointers = [t.data_ptr() for t in (*given, *gradients)]
    failed = _kernel(name)(_ARGS.pack(
        q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), block_q, block_k,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), block_map.data_ptr(),
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        scale, DTYPE_CODES[q.dtype], native.threads_for(q.numel() * k.size(2)),
        *pointers, *[0] * (7 - len(pointers)),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"block_sparse_attention could not allocate scratch memory for q {list(q.shape)}")

"""Neighborhood attention in compiled code: tiles of sixteen queries against the keys that any of them sees."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.neighborhood_attention.args import Args, BackwardArgs

_ARGS = struct.Struct("6q3q3q3q3q3q5P5q5q5q3q3qdqqPP2P5P")  # the fields of na_args in neighborhood.h
_kernel = native.loader_by_name(_ARGS)


def reject(query: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(query)


def reject_backward(grad: Tensor, grad_lse: Tensor, query: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(query)


def neighborhood_attention(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference."""
    query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values = args
    out = query.new_empty(*query.shape[:-1], value.size(-1))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    windows = (kernel_size, stride, dilation, is_causal)
    tensors = (query, key, value, additional_keys, additional_values)
    _call("eff_neighborhood", tensors, windows, scale, [out, lse], [])
    return out, lse


def neighborhood_attention_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the reference; the sums have a fixed order, whatever the number of threads."""
    grad, grad_lse, query, key, value, out, lse = args[:7]
    kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values = args[7:]
    tensors = (query, key, value, additional_keys, additional_values)
    dq, dk, dv, dmore_k, dmore_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)
    windows = (kernel_size, stride, dilation, is_causal)
    given = [out.contiguous(), lse.contiguous(), grad.to(query.dtype).contiguous(), grad_lse.float().contiguous()]
    _call("eff_neighborhood_backward", tensors, windows, scale, given, [dq, dk, dv, dmore_k, dmore_v])
    return dq, dk, dv, dmore_k, dmore_v


def _call(
    name: str,
    tensors: Sequence[Tensor],
    windows: Sequence[Sequence[int]],
    scale: float,
    given: Sequence[Tensor],
    gradients: Sequence[Tensor],
) -> None:
    """Fill the struct of the C code; maps of fewer than three axes get leading ones of length one."""
    tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]
    query, key, value, more_k, more_v = tensors
    pad = 6 - query.dim()
    strides = [(t.stride(0), *[0] * pad, *t.stride()[1:-1]) for t in tensors]
    shape = query.shape[1:-2]
    axes = [*[1] * pad, *shape]
    settings = [[fill] * pad + list(w) for fill, w in zip((1, 1, 1, 0), windows, strict=True)]
    pointers = [t.data_ptr() for t in given]
    work = query.numel() * (math.prod(windows[0]) + more_k.size(1))
    failed = _kernel(name)(_ARGS.pack(
        query.size(0), query.size(-2), key.size(-2), query.size(-1), value.size(-1), more_k.size(1),
        *axes, *settings[0], *settings[1], *settings[2], *settings[3],
        *(t.data_ptr() for t in tensors),
        *strides[0], *strides[1], *strides[2], *(more_k.stride()[:-1]), *(more_v.stride()[:-1]),
        scale, DTYPE_CODES[query.dtype], native.threads_for(work),
        *pointers, *[0] * (4 - len(pointers)),
        *(t.data_ptr() for t in gradients), *[0] * (5 - len(gradients)),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"neighborhood_attention could not allocate scratch memory for query {list(query.shape)}")

"""decode_attention in compiled code: the cache is read once, key-value heads are never expanded."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from eff_kernels import native


def reject(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, scale: float) -> str | None:
    """Why the compiled code cannot run this call."""
    if not q.is_cpu:
        return f"needs CPU tensors, got q on {q.device}"
    if q.dtype not in native.DTYPE_CODES or k.dtype not in native.DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got q {q.dtype} and cache {k.dtype}"
    if q.size(2) % 8:
        return f"needs a head dimension that 8 divides, got {q.size(2)}"
    if k.stride() != v.stride() or k.stride(3) != 1:
        seen = f"{k.stride()} and {v.stride()}"
        return f"needs keys and values with equal strides and a contiguous last dimension, got strides {seen}"
    return native.unavailable()


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, scale: float
) -> Tensor:
    """As the reference."""
    batch, heads, d = q.shape
    q = q.contiguous()
    lengths = lengths.contiguous()
    out = torch.empty_like(q)
    page_stride, head_stride, key_stride, _ = k.stride()
    if block_table is not None:
        block_table = block_table.contiguous()
    failed = _kernel()(
        q.data_ptr(), native.DTYPE_CODES[q.dtype], k.data_ptr(), v.data_ptr(), native.DTYPE_CODES[k.dtype],
        batch, heads, k.size(1), d, k.size(2), page_stride, head_stride, key_stride,
        None if block_table is None else block_table.data_ptr(), 0 if block_table is None else block_table.size(1),
        lengths.data_ptr(), scale, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"decode_attention could not allocate scratch memory for q {list(q.shape)}")
    return out


@functools.cache
def _kernel() -> Callable[..., int]:
    kernel = native.library().eff_decode_attention
    p, i, n = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    kernel.argtypes = [p, i, p, p, i, n, n, n, n, n, n, n, n, p, n, p, ctypes.c_float, p, i]
    kernel.restype = i
    return kernel

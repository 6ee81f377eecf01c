"""rope in compiled code; x may be any view with unit stride in the last dimension, such as heads of a projection."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

from torch import Tensor, contiguous_format, empty_like

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES, threads_for

_ARGS = struct.Struct("qqqqqPqqqPPqqqqPqqqq")  # the fields of args in rope.c


def reject(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> str | None:
    """Why the compiled code cannot run this call."""
    if not x.is_cpu:
        return f"needs CPU tensors, got x on {x.device}"
    if x.dtype not in DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got {x.dtype}"
    return native.unavailable()


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """As the reference."""
    out = empty_like(x, memory_format=contiguous_format)
    batch, heads, tokens, d = x.shape
    x_batch, x_head, x_token, step = x.stride()
    if step != 1:
        x = x.contiguous()
        x_batch, x_head, x_token, _ = x.stride()
    if not (cos.is_contiguous() and sin.is_contiguous()):
        cos, sin = cos.contiguous(), sin.contiguous()
    same, _, pairs = cos.shape
    table_batch = 0 if same == 1 else tokens * pairs
    _kernel()(_ARGS.pack(
        batch, heads, tokens, d, pairs, x.data_ptr(), x_batch, x_head, x_token, cos.data_ptr(), sin.data_ptr(),
        table_batch, pairs, table_batch, pairs, out.data_ptr(), interleaved, inverse,
        DTYPE_CODES[x.dtype], threads_for(batch * heads * tokens * d),
    ))  # fmt: skip
    return out


@functools.cache
def _kernel() -> Callable[[bytes], None]:
    return native.struct_kernel("eff_rope", _ARGS)

"""rope in compiled code; x may be any view with unit stride in the last dimension, such as heads of a projection."""

from __future__ import annotations

import struct

from torch import Tensor, contiguous_format, empty_like

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES, threads_for
from eff_kernels.ops.rope.args import Args

_ARGS = struct.Struct("qqqqqPqqqPPqqqqPqqqq")  # the fields of args in rope.c
_kernel = native.loader("eff_rope", _ARGS, may_fail=False)


def reject(x: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(x)


def rope(*args: *Args) -> Tensor:
    """As the reference."""
    x, cos, sin, interleaved, inverse = args
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

"""grouped_lora in compiled code."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.grouped_lora.args import Args
from eff_kernels.ops.grouped_lora.common import wrong_ids

_ARGS = struct.Struct("PqqqqPPqqqqPqqPPPqqPq")  # the fields of args in grouped_lora.c
_kernel = native.loader("eff_grouped_lora", _ARGS)
_WRONG_ID = 2


def reject(*args: *Args) -> str | None:
    """Why the compiled code cannot run this call."""
    x, a, *_, y = args
    return native.unfit(x, a.dtype, x.dtype if y is None else y.dtype)


def grouped_lora(*args: *Args) -> Tensor:
    """As the reference. A row of the result has the same bits whatever the other rows are."""
    x, a, b, ids, weights, scale, y = args
    if x.stride(1) != 1:
        x = x.contiguous()
    a, b, ids = a.contiguous(), b.contiguous(), ids.contiguous()
    weights_at = scale_at = y_at = y_step = 0
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
        weights_at = weights.data_ptr()
    if scale is not None:
        scale = scale.to(torch.float32).contiguous()
        scale_at = scale.data_ptr()
    if y is not None:
        if y.stride(1) != 1:
            y = y.contiguous()
        y_at, y_step = y.data_ptr(), y.stride(0)
    (t, k), (num_experts, n, r), places = x.shape, b.shape, ids.shape[1]
    out = x.new_empty((t, n), dtype=x.dtype if y is None else y.dtype)
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], t, k, x.stride(0), a.data_ptr(), b.data_ptr(), DTYPE_CODES[a.dtype],
        num_experts, r, n, ids.data_ptr(), ids.dtype is torch.int64, places, weights_at, scale_at, y_at, y_step,
        DTYPE_CODES[out.dtype], out.data_ptr(), native.threads_for(t * places * r * (k + n)),
    ))  # fmt: skip
    if failed == _WRONG_ID:
        raise IndexError(wrong_ids(ids, num_experts))
    if failed:
        raise MemoryError(f"grouped_lora could not allocate scratch memory for x {list(x.shape)}")
    return out

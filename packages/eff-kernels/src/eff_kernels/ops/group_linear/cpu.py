"""group_linear in compiled code: one call from float activations to float outputs."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.group_linear.args import Args
from eff_kernels.ops.group_linear.pack import GROUP

_ARGS = struct.Struct("PqqqqqPqqqqPPqq")  # the fields of args in group_linear.c
_kernel = native.loader("eff_group_linear", _ARGS)


def reject(*args: *Args) -> str | None:
    """Why the compiled code cannot run this call."""
    x, *_, out_dtype = args
    return native.unfit(x, out_dtype)


def group_linear(*args: *Args) -> Tensor:
    """As the reference."""
    x, packed, bias, n, bits, offset, minima, wide, out_dtype = args
    if x.stride(1) != 1:
        x = x.contiguous()
    packed = packed.contiguous()
    if bias is not None:
        bias = bias.float().contiguous()
    m = x.size(0)
    y = torch.empty(m, n, dtype=out_dtype)
    failed = _kernel()(_ARGS.pack(
        x.data_ptr(), DTYPE_CODES[x.dtype], m, n, packed.size(1) * GROUP, x.stride(0), packed.data_ptr(), bits, offset,
        minima, wide, 0 if bias is None else bias.data_ptr(), y.data_ptr(), DTYPE_CODES[out_dtype],
        native.threads_for(m * n * packed.size(1) * GROUP),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"group_linear could not allocate scratch memory for x {list(x.shape)}")
    return y

"""swiglu in compiled code, with an exponential of our own that the compiler turns into vectors."""

from __future__ import annotations

import struct

import torch
from torch import Tensor, contiguous_format, empty_like

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES, rows_of
from eff_kernels.ops.swiglu.args import Args, BackwardArgs

_ARGS = struct.Struct("qqPqPqPqPPqq")  # the fields of args in swiglu.c
_kernel = native.loader("eff_swiglu", _ARGS, may_fail=False)
_PARALLEL_FROM = 16384  # elements; an exponential costs about as much as eight loads


def reject(gate: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(gate)


def reject_backward(grad: Tensor, gate: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(gate)


def swiglu(*args: *Args) -> Tensor:
    """As the reference."""
    gate, up = args
    out = empty_like(gate, memory_format=contiguous_format)
    d, numel = gate.shape[-1], out.numel()
    gate, gate_stride = rows_of(gate)
    up, up_stride = rows_of(up)
    _kernel()(_ARGS.pack(
        numel // d if d else 0, d, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, 0, 0,
        out.data_ptr(), 0, DTYPE_CODES[gate.dtype], 1 if numel < _PARALLEL_FROM else torch.get_num_threads(),
    ))  # fmt: skip
    return out


def swiglu_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    """As the reference."""
    grad, gate, up = args
    to_gate = empty_like(gate, memory_format=contiguous_format)
    to_up = empty_like(gate, memory_format=contiguous_format)
    d, numel = gate.shape[-1], to_gate.numel()
    if numel == 0:  # an empty grad has no address, which in C stands for the forward
        return to_gate, to_up
    gate, gate_stride = rows_of(gate)
    up, up_stride = rows_of(up)
    grad, grad_stride = rows_of(grad)
    _kernel()(_ARGS.pack(
        numel // d, d, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, grad.data_ptr(), grad_stride,
        to_gate.data_ptr(), to_up.data_ptr(), DTYPE_CODES[gate.dtype],
        1 if numel < _PARALLEL_FROM else torch.get_num_threads(),
    ))  # fmt: skip
    return to_gate, to_up

"""swiglu in compiled code, with an exponential of our own that the compiler turns into vectors."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable

import torch
from torch import Tensor, contiguous_format, empty_like

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES, rows_of

_ARGS = struct.Struct("qqPqPqPqPPqq")  # the fields of args in swiglu.c
_PARALLEL_FROM = 16384  # elements; an exponential costs about as much as eight loads


def reject(gate: Tensor, up: Tensor) -> str | None:
    """Why the compiled code cannot run this call."""
    if not gate.is_cpu:
        return f"needs CPU tensors, got gate on {gate.device}"
    if gate.dtype not in DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got {gate.dtype}"
    return native.unavailable()


def reject_backward(grad: Tensor, gate: Tensor, up: Tensor) -> str | None:
    """Why the compiled code cannot run this call."""
    return reject(gate, up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """As the reference."""
    out = empty_like(gate, memory_format=contiguous_format)
    d, numel = gate.shape[-1], out.numel()
    gate, gate_stride = rows_of(gate)
    up, up_stride = rows_of(up)
    _kernel()(_ARGS.pack(
        numel // d if d else 0, d, gate.data_ptr(), gate_stride, up.data_ptr(), up_stride, 0, 0,
        out.data_ptr(), 0, DTYPE_CODES[gate.dtype], 1 if numel < _PARALLEL_FROM else torch.get_num_threads(),
    ))  # fmt: skip
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference."""
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


@functools.cache
def _kernel() -> Callable[[bytes], None]:
    return native.struct_kernel("eff_swiglu", _ARGS)

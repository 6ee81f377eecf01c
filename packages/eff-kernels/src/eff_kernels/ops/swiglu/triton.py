"""Triton kernels of swiglu: one program for a block of one row; rows may lie any distance apart.

D: features of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import AotCase
from eff_kernels.ops.swiglu.args import Args, BackwardArgs

_BLOCK = 1024


@triton.jit
def _swiglu_fwd_kernel(gate_ptr, gate_stride, up_ptr, up_stride, out_ptr, d, D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column_D = tl.program_id(1) * D + tl.arange(0, D)
    mask_D = column_D < d
    gate_D = tl.load(gate_ptr + row * gate_stride + column_D, mask_D, other=0.0).to(tl.float32)
    up_D = tl.load(up_ptr + row * up_stride + column_D, mask_D, other=0.0).to(tl.float32)
    out_D = gate_D * tl.sigmoid(gate_D) * up_D
    tl.store(out_ptr + row * d + column_D, out_D.to(out_ptr.dtype.element_ty), mask_D)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr, grad_stride, gate_ptr, gate_stride, up_ptr, up_stride, to_gate_ptr, to_up_ptr, d, D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column_D = tl.program_id(1) * D + tl.arange(0, D)
    mask_D = column_D < d
    grad_D = tl.load(grad_ptr + row * grad_stride + column_D, mask_D, other=0.0).to(tl.float32)
    gate_D = tl.load(gate_ptr + row * gate_stride + column_D, mask_D, other=0.0).to(tl.float32)
    up_D = tl.load(up_ptr + row * up_stride + column_D, mask_D, other=0.0).to(tl.float32)
    s_D = tl.sigmoid(gate_D)
    to_gate_D = grad_D * up_D * s_D * (1.0 + gate_D * (1.0 - s_D))
    tl.store(to_gate_ptr + row * d + column_D, to_gate_D.to(to_gate_ptr.dtype.element_ty), mask_D)
    tl.store(to_up_ptr + row * d + column_D, (grad_D * gate_D * s_D).to(to_up_ptr.dtype.element_ty), mask_D)


def reject(*args: *Args) -> str | None:
    gate, *_ = args
    if gate.dtype == torch.float64:
        return "computes in float32, got float64"
    return None


def reject_backward(*args: *BackwardArgs) -> str | None:
    _, gate, up = args
    return reject(gate, up)


def run(*args: *Args) -> Tensor:
    gate, up = args
    out = gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return out
    gate, up = _rows(gate), _rows(up)
    rows, d = gate.shape
    _swiglu_fwd_kernel[(rows, triton.cdiv(d, _BLOCK))](gate, gate.stride(0), up, up.stride(0), out, d, D=_BLOCK)
    return out


def swiglu_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    grad, gate, up = args
    to_gate, to_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel() == 0:
        return to_gate, to_up
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    rows, d = gate.shape
    _swiglu_bwd_kernel[(rows, triton.cdiv(d, _BLOCK))](
        grad, grad.stride(0), gate, gate.stride(0), up, up.stride(0), to_gate, to_up, d, D=_BLOCK
    )
    return to_gate, to_up


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _aot_cases() -> list[AotCase]:
    cases = []
    for dtype in ("bf16", "fp32"):
        forward = {**dict.fromkeys(("gate_ptr", "up_ptr", "out_ptr"), f"*{dtype}")}
        backward = {**dict.fromkeys(("grad_ptr", "gate_ptr", "up_ptr", "to_gate_ptr", "to_up_ptr"), f"*{dtype}")}
        sizes = dict.fromkeys(("gate_stride", "up_stride", "d"), "i32")
        cases += [
            AotCase(
                name=f"forward-{dtype}",
                kernel=_swiglu_fwd_kernel,
                signature={**forward, **sizes},
                constexprs={"D": _BLOCK},
            ),
            AotCase(
                name=f"backward-{dtype}",
                kernel=_swiglu_bwd_kernel,
                signature={**backward, **sizes, "grad_stride": "i32"},
                constexprs={"D": _BLOCK},
            ),
        ]
    return cases


AOT_CASES = _aot_cases()

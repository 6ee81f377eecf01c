"""Triton kernels of rms_norm: a program holds whole rows in registers, so that each element is read once.

R: rows of a program, D: features, padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import AotCase
from eff_kernels.ops.rms_norm.args import AddArgs, Args, BackwardArgs

_LONGEST = {"forward": 16384, "backward": 8192}  # of a row in registers; the backward keeps four of them


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, weight_ptr, total_ptr, out_ptr, rows, d, eps,
    ADD: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column_D = tl.arange(0, D)
    mask_RD = (row_R < rows)[:, None] & (column_D < d)[None, :]
    x_RD = tl.load(x_ptr + row_R[:, None] * x_stride + column_D[None, :], mask_RD, other=0.0).to(tl.float32)
    out_offset_RD = row_R[:, None] * d + column_D[None, :]
    if ADD:
        residual_offset_RD = row_R[:, None] * residual_stride + column_D[None, :]
        x_RD += tl.load(residual_ptr + residual_offset_RD, mask_RD, other=0.0).to(tl.float32)
        total_RD = x_RD.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + out_offset_RD, total_RD, mask_RD)
        x_RD = total_RD.to(tl.float32)  # the norm is that of the rounded sum
    scale_R = 1.0 / tl.sqrt_rn(tl.sum(x_RD * x_RD, 1) / d + eps)
    weight_D = tl.load(weight_ptr + column_D, column_D < d, other=0.0).to(tl.float32)
    out_RD = x_RD * scale_R[:, None] * weight_D[None, :]
    tl.store(out_ptr + out_offset_RD, out_RD.to(out_ptr.dtype.element_ty), mask_RD)


@triton.jit
def _rms_norm_bwd_kernel(
    grad_ptr, grad_stride, x_ptr, x_stride, weight_ptr, more_ptr, more_stride, grad_x_ptr, parts_ptr, rows, d, eps,
    MORE: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    column_D = tl.arange(0, D)
    weight_D = tl.load(weight_ptr + column_D, column_D < d, other=0.0).to(tl.float32)
    part_D = tl.zeros([D], tl.float32)
    for first in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row_R = (first + tl.arange(0, R)).to(tl.int64)
        mask_RD = (row_R < rows)[:, None] & (column_D < d)[None, :]
        x_RD = tl.load(x_ptr + row_R[:, None] * x_stride + column_D[None, :], mask_RD, other=0.0).to(tl.float32)
        grad_offset_RD = row_R[:, None] * grad_stride + column_D[None, :]
        grad_RD = tl.load(grad_ptr + grad_offset_RD, mask_RD, other=0.0).to(tl.float32)
        scale_R = 1.0 / tl.sqrt_rn(tl.sum(x_RD * x_RD, 1) / d + eps)
        normed_RD = x_RD * scale_R[:, None]
        part_D += tl.sum(grad_RD * normed_RD, 0)
        grad_RD *= weight_D[None, :]
        pull_R = tl.sum(grad_RD * normed_RD, 1) / d
        grad_x_RD = (grad_RD - normed_RD * pull_R[:, None]) * scale_R[:, None]
        if MORE:
            more_offset_RD = row_R[:, None] * more_stride + column_D[None, :]
            grad_x_RD += tl.load(more_ptr + more_offset_RD, mask_RD, other=0.0).to(tl.float32)
        tl.store(
            grad_x_ptr + row_R[:, None] * d + column_D[None, :], grad_x_RD.to(grad_x_ptr.dtype.element_ty), mask_RD
        )
    tl.store(parts_ptr + tl.program_id(0) * d + column_D, part_D, column_D < d)


def reject(x: Tensor, weight: Tensor, eps: float, kind: str = "forward") -> str | None:
    if x.dtype == torch.float64 or weight.dtype == torch.float64:
        return "computes in float32, got float64"
    if x.size(-1) > _LONGEST[kind]:
        return f"keeps a row in registers, at most {_LONGEST[kind]} elements ({kind}), got {x.size(-1)}"
    return None


def reject_add(*args: *AddArgs) -> str | None:
    x, _, weight, eps = args
    return reject(x, weight, eps)


def reject_backward(*args: *BackwardArgs) -> str | None:
    _, x, weight, eps, *_ = args
    return reject(x, weight, eps, "backward")


def run(*args: *Args) -> Tensor:
    x, weight, eps = args
    return _forward(x, None, weight, eps)[0]


def add_rms_norm(*args: *AddArgs) -> tuple[Tensor, Tensor]:
    x, residual, weight, eps = args
    return _forward(x, residual, weight, eps)


def rms_norm_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    grad, x, weight, eps, grad_residual = args
    grad_x = x.new_empty(x.shape)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    x, grad = _rows(x), _rows(grad)
    more = grad if grad_residual is None else _rows(grad_residual)
    rows, d = x.shape
    block = _block(d)
    programs = min(triton.cdiv(rows, block["R"]), _parallel_programs(x.device))
    parts = torch.empty(programs, d, dtype=torch.float32, device=x.device)
    _rms_norm_bwd_kernel[(programs,)](
        grad, grad.stride(0), x, x.stride(0), weight.contiguous(), more, more.stride(0), grad_x, parts, rows, d, eps,
        MORE=grad_residual is not None, **block,
    )  # fmt: skip
    return grad_x, parts.sum(0).to(weight.dtype)


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out = x.new_empty(x.shape)
    total = out if residual is None else x.new_empty(x.shape)
    if x.numel() == 0:
        return out, total
    x = _rows(x)
    other = x if residual is None else _rows(residual)
    rows, d = x.shape
    block = _block(d)
    _rms_norm_fwd_kernel[(triton.cdiv(rows, block["R"]),)](
        x, x.stride(0), other, other.stride(0), weight.contiguous(), total, out, rows, d, eps,
        ADD=residual is not None, **block,
    )  # fmt: skip
    return out, total


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.size(-1))
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _block(d: int) -> dict[str, int]:
    """Rows so that a program has about 2048 elements, and warps so that a thread has at most 16 of a row."""
    width = triton.next_power_of_2(d)
    return {"R": max(1, 2048 // width), "D": width, "num_warps": min(max(width // 512, 4), 16)}


def _parallel_programs(device: torch.device) -> int:
    """Programs of the backward, a few for each multiprocessor; each sums its own part of the weight's gradient."""
    if device.type != "cuda":
        return 4
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def _aot_cases() -> list[AotCase]:
    pointers = {
        "forward": ("x_ptr", "residual_ptr", "weight_ptr", "total_ptr", "out_ptr"),
        "backward": ("grad_ptr", "x_ptr", "weight_ptr", "more_ptr", "grad_x_ptr"),
    }
    sizes = {
        "forward": ("x_stride", "residual_stride", "rows", "d"),
        "backward": ("grad_stride", "x_stride", "more_stride", "rows", "d"),
    }
    cases = []
    for kind, longest in _LONGEST.items():
        for dtype, d in (("bf16", 128), ("bf16", 4096), ("fp16", longest), ("fp32", longest)):
            block = _block(d)
            options = {"num_warps": block.pop("num_warps")}
            signature = dict.fromkeys(pointers[kind], f"*{dtype}") | dict.fromkeys(sizes[kind], "i32") | {"eps": "fp32"}
            if kind == "backward":
                signature["parts_ptr"] = "*fp32"
            cases.append(
                AotCase(
                    name=f"{kind}-{dtype}-{d}",
                    kernel=_rms_norm_fwd_kernel if kind == "forward" else _rms_norm_bwd_kernel,
                    signature=signature,
                    constexprs={"ADD" if kind == "forward" else "MORE": True, **block},
                    options=options,
                )
            )
    return cases


AOT_CASES = _aot_cases()

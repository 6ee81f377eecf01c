"""Kernels for the tests of the ahead-of-time gate: one that passes and one for each thing the gate must find."""

import triton
import triton.language as tl
from eff_kernels.aot import AotCase


@triton.jit
def _scale_kernel(x_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, tl.load(x_ptr + offset, mask=offset < n) * factor, mask=offset < n)


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, out_ptr, K, stride_a, stride_b, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.dot(
        tl.load(a_ptr + m[:, None] * stride_a + k[None, :]), tl.load(b_ptr + n[None, :] * stride_b + k[:, None])
    )
    for start in range(BK, K, BK):
        a = tl.load(a_ptr + m[:, None] * stride_a + start + k[None, :])
        b = tl.load(b_ptr + n[None, :] * stride_b + start + k[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(out_ptr + m[:, None] * BN + n[None, :], acc)


@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 100, "BLOCK is too small")
    tl.store(x_ptr, 1.0)


def matmul(name, block, dtype="fp16", targets=("sm_80", "sm_90", "sm_100", "gfx942"), warps=4, stages=2, mma="any"):
    return AotCase(
        name=name,
        kernel=_matmul_kernel,
        signature={
            "a_ptr": f"*{dtype}",
            "b_ptr": f"*{dtype}",
            "out_ptr": "*i32" if dtype == "i8" else "*fp32",
            "K": "i32",
            "stride_a": "i32",
            "stride_b": "i32",
        },
        constexprs={"BM": block, "BN": block, "BK": 64},
        options={"num_warps": warps, "num_stages": stages},
        targets=targets,
        mma=mma,
    )


def scale(name, mma=None, targets=("sm_80",), constexprs=None):
    return AotCase(
        name=name,
        kernel=_scale_kernel,
        signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32", "factor": "fp32"},
        constexprs={"BLOCK": 1024} if constexprs is None else constexprs,
        mma=mma,
        targets=targets,
    )


GOOD = [
    scale("scale", targets=("sm_80", "sm_90", "sm_100", "gfx942")),
    matmul("fp16", 64),
    matmul("int8", 64, dtype="i8", targets=("sm_80", "gfx942"), mma="int8"),
]
BAD = [
    matmul("spills", 128, targets=("sm_80", "gfx942"), warps=1, stages=1),
    scale("no-matrix-instruction", mma="any", targets=("sm_90", "gfx942")),
    matmul("fp16-not-int8", 64, targets=("sm_80",), mma="int8"),
    matmul("shared", 128, targets=("sm_80",), warps=8, stages=8),
    matmul("shared-hip", 128, targets=("gfx942",), warps=8, stages=4),
    AotCase(
        name="static-assert",
        kernel=_broken_kernel,
        signature={"x_ptr": "*fp32"},
        constexprs={"BLOCK": 64},
        targets=("sm_80",),
    ),
    scale("missing-argument", constexprs={}),
]
AOT_CASES = GOOD + BAD

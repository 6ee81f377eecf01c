"""Triton kernels of neighborhood attention. Not yet run on a GPU: compiled and interpreted only.

A program takes a box of queries of one dilation group and walks over the box of keys that any of them sees, masked
query by query, with an online softmax.

M: queries of a program. N: keys of a block.
D, E: features of keys and of values, padded to powers of two.
m, l, alpha, p: running maximum and sum of the online softmax, the factor of what came before, and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET, AotCase
from eff_kernels.ops.neighborhood_attention import triton_windows as w
from eff_kernels.ops.neighborhood_attention.args import Args

_LONGEST_HEAD = 128
_LOG2E = 1.4426950408889634


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, more_k_ptr, more_v_ptr, out_ptr, lse_ptr, scale, heads, groups, d, e, extra,
    L0, L1, L2, K0, K1, K2, S0, S1, S2, D0, D1, D2,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    WIDEN: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = T0 * T1 * T2
    g0, p0, n0, g1, p1, n1, g2, p2, n2 = w.places(tl.program_id(0), L0, L1, L2, D0, D1, D2, T0, T1, T2, BM)
    valid_M = (p0 < n0) & (p1 < n1) & (p2 < n2)
    lo0, hi0 = w.window(p0, n0, K0, S0, C0)
    lo1, hi1 = w.window(p1, n1, K1, S1, C1)
    lo2, hi2 = w.window(p2, n2, K2, S2, C2)
    a0, b0 = w.span(lo0, hi0, valid_M)
    a1, b1 = w.span(lo1, hi1, valid_M)
    a2, b2 = w.span(lo2, hi2, valid_M)
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    kv = head // (heads // groups)
    tokens = L0 * L1 * L2
    d_D, e_E = tl.arange(0, BD), tl.arange(0, BE)
    row_M = (batch * tokens + w.token(p0, p1, p2, g0, g1, g2, D0, D1, D2, L1, L2)) * heads + head
    q_MD = tl.load(q_ptr + row_M[:, None] * d + d_D[None, :], valid_M[:, None] & (d_D < d)[None, :], other=0.0)
    if WIDEN:
        q_MD = q_MD.to(tl.float32)
    m_M = tl.full([BM], float("-inf"), tl.float32)
    l_M = tl.zeros([BM], tl.float32)
    out_ME = tl.zeros([BM, BE], tl.float32)
    total = w.size(a0, b0, a1, b1, a2, b2)
    near = tl.cdiv(total, BN)
    for block in range(near + tl.cdiv(extra, BN)):
        c_N = block * BN + tl.arange(0, BN)
        x_N, y_N, z_N = w.inside_box(c_N, a0, a1, a2, b1, b2)
        is_near = block < near
        more_N = (block - near) * BN + tl.arange(0, BN)
        exists_N = tl.where(is_near, c_N < total, more_N < extra)
        seen_MN = w.seen(x_N[None, :], y_N[None, :], z_N[None, :], lo0[:, None], hi0[:, None], lo1[:, None],
                         hi1[:, None], lo2[:, None], hi2[:, None])  # fmt: skip
        seen_MN = exists_N[None, :] & valid_M[:, None] & (seen_MN | (block >= near))
        if is_near:
            row_N = (batch * tokens + w.token(x_N, y_N, z_N, g0, g1, g2, D0, D1, D2, L1, L2)) * groups + kv
            k_ND = w.rows(k_ptr, row_N, d, d_D, exists_N, WIDEN)
            v_NE = w.rows(v_ptr, row_N, e, e_E, exists_N, WIDEN)
        else:
            row_N = (batch * extra + more_N) * groups + kv
            k_ND = w.rows(more_k_ptr, row_N, d, d_D, exists_N, WIDEN)
            v_NE = w.rows(more_v_ptr, row_N, e, e_E, exists_N, WIDEN)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale  # in units of log 2
        score_MN = tl.where(seen_MN, score_MN, float("-inf"))
        m_new_M = tl.maximum(m_M, tl.max(score_MN, 1))
        m_safe_M = tl.where(m_new_M == float("-inf"), 0.0, m_new_M)
        p_MN = tl.exp2(score_MN - m_safe_M[:, None])
        alpha_M = tl.exp2(m_M - m_safe_M)
        l_M = l_M * alpha_M + tl.sum(p_MN, 1)
        out_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, out_ME * alpha_M[:, None], input_precision="ieee")
        m_M = m_new_M
    l_M = tl.where(valid_M, l_M, 1.0)
    out_ME /= l_M[:, None]
    tl.store(
        out_ptr + row_M[:, None] * e + e_E[None, :], out_ME.to(out_ptr.dtype.element_ty),
        valid_M[:, None] & (e_E < e)[None, :],
    )  # fmt: skip
    tl.store(lse_ptr + row_M, (m_M + tl.log2(l_M)) * 0.6931471805599453, valid_M)


def reject(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> str | None:
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {query.dtype}"
    if max(query.size(-1), value.size(-1)) > _LONGEST_HEAD:
        return f"takes head dimensions up to {_LONGEST_HEAD}, got {query.size(-1)} and {value.size(-1)}"
    return None


def padded(query: Tensor, windows: Sequence[Sequence[int]]) -> tuple[list[int], list[bool]]:
    """Lengths, windows, strides and dilations of three axes, the missing ones of length 1; and which are causal."""
    missing = [1] * (6 - query.dim())
    axes = [[*missing, *values] for values in (query.shape[1:-2], *windows[:3])]
    return [n for axis in axes for n in axis], [False] * len(missing) + [bool(c) for c in windows[3]]


def blocks(dtype: torch.dtype, rank: int, d: int, e: int) -> dict[str, int]:
    """Box of queries, and block of keys."""
    wide = dtype == torch.float32
    tile = ((1, 1, 32), (1, 4, 8), (2, 4, 4)) if wide else ((1, 1, 64), (1, 8, 8), (4, 4, 4))
    sizes = {"BD": max(16, triton.next_power_of_2(d)), "BE": max(16, triton.next_power_of_2(e))}
    names = dict(zip(("T0", "T1", "T2"), tile[rank - 1], strict=True))
    return {
        **names,
        "BN": 32 if wide else 64,
        **sizes,
        "num_warps": 8 if max(d, e) > 64 else 4,
        "num_stages": 1 if wide else 2,
    }


def grid(query: Tensor, lengths: Sequence[int], block: dict[str, int], heads: int) -> tuple[int, int]:
    """Programs: boxes, and heads of the batch."""
    boxes = 1
    for axis in range(3):
        length, dilation = lengths[axis], lengths[9 + axis]
        boxes *= dilation * triton.cdiv(triton.cdiv(length, dilation), block[f"T{axis}"])
    return boxes, query.size(0) * heads


def run(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference."""
    query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values = args
    out = query.new_empty(*query.shape[:-1], value.size(-1))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tensors = [t.contiguous() for t in (query, key, value, additional_keys, additional_values)]
    lengths, causal = padded(query, (kernel_size, stride, dilation, is_causal))
    heads, d, e = query.size(-2), query.size(-1), value.size(-1)
    block = blocks(query.dtype, query.dim() - 3, d, e)
    _forward_kernel[grid(query, lengths, block, heads)](
        *tensors, out, lse, scale * _LOG2E, heads, key.size(-2), d, e, additional_keys.size(1), *lengths,
        C0=causal[0], C1=causal[1], C2=causal[2], WIDEN=INTERPRET, **block,
    )  # fmt: skip
    return out, lse


def aot_cases(kernel: Any, floats: Sequence[str], tensors: Sequence[str], sizes_of: Any = blocks) -> list[AotCase]:
    """A kernel for several dtypes, ranks and head dimensions."""
    cases = []
    sizes = ["heads", "groups", "d", "e", *(f"{n}{axis}" for n in "LKSD" for axis in range(3))]
    for name, dtype, rank, d in (
        ("bf16", torch.bfloat16, 2, 128),
        ("fp16", torch.float16, 1, 64),
        ("bf16", torch.bfloat16, 3, 32),
        ("fp32", torch.float32, 2, 32),
        ("fp32", torch.float32, 1, 128),
    ):
        block = sizes_of(dtype, rank, d, d)
        options = {key: block.pop(key) for key in ("num_warps", "num_stages")}
        pointers = {**dict.fromkeys(tensors, f"*{name}"), **dict.fromkeys(floats, "*fp32")}
        integers = [*sizes, *(["extra"] if "extra" in kernel.arg_names else [])]
        cases.append(
            AotCase(
                name=f"{kernel.fn.__name__}-{name}-rank{rank}-d{d}",
                kernel=kernel,
                signature={**pointers, "scale": "fp32", **dict.fromkeys(integers, "i32")},
                constexprs={"C0": False, "C1": False, "C2": rank == 1, "WIDEN": False, **block},
                options=options,
                mma=None if name == "fp32" else "any",
                unaligned=tuple(n for n in integers if n not in "de"),
            )
        )
    return cases


_TENSORS = ("q_ptr", "k_ptr", "v_ptr", "more_k_ptr", "more_v_ptr", "out_ptr")
AOT_CASES = aot_cases(_forward_kernel, ["lse_ptr"], _TENSORS)

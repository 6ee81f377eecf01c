"""Triton kernels of block-sparse attention, forward. Not yet run on a GPU: compiled and interpreted only.

A program takes queries of one block and head and walks over the list of its blocks of keys with an online softmax.

M: queries of a tile, N: keys of a tile; a block is one or several tiles.
D, E: features of keys and of values, padded to powers of two.
m, l, alpha, p: running maximum and sum of the online softmax, the factor of what came before, and the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET, AotCase
from eff_kernels.ops.block_sparse_attention.args import Args

_LONGEST_HEAD = 128
_LOG2E = 1.4426950408889634


@triton.jit
def load_rows(ptr, first, stride, count, d, R: tl.constexpr, BD: tl.constexpr, WIDEN: tl.constexpr):
    """Rows first .. first + R of [count, d], zeros outside."""
    row = first + tl.arange(0, R)
    column = tl.arange(0, BD)
    x = tl.load(
        ptr + row[:, None].to(tl.int64) * stride + column[None, :],
        (row < count)[:, None] & (column < d)[None, :],
        other=0.0,
    )
    if WIDEN:
        x = x.to(tl.float32)
    return x


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, list_ptr, count_ptr, out_ptr, lse_ptr, scale, heads, groups, queries, keys, d, e, tm, tn,
    QB: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv = head // heads * groups + head % heads // (heads // groups)
    q_MD = load_rows(q_ptr + head * queries * d, tile * BM, d, queries, d, BM, BD, WIDEN)
    k_ptr += kv * keys * d
    v_ptr += kv * keys * e
    row_of_map = head * tm + tile * BM // QB
    list_ptr += row_of_map * tn
    m_M = tl.full([BM], float("-inf"), tl.float32)
    l_M = tl.zeros([BM], tl.float32)
    out_ME = tl.zeros([BM, BE], tl.float32)
    PARTS: tl.constexpr = KB // BN
    for i in range(tl.load(count_ptr + row_of_map) * PARTS):
        first = tl.load(list_ptr + i // PARTS) * KB + i % PARTS * BN
        k_ND = load_rows(k_ptr, first, d, keys, d, BN, BD, WIDEN)
        v_NE = load_rows(v_ptr, first, e, keys, e, BN, BE, WIDEN)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale  # in units of log 2
        score_MN = tl.where((first + tl.arange(0, BN) < keys)[None, :], score_MN, float("-inf"))
        m_new_M = tl.maximum(m_M, tl.max(score_MN, 1))
        m_safe_M = tl.where(m_new_M == float("-inf"), 0.0, m_new_M)
        p_MN = tl.exp2(score_MN - m_safe_M[:, None])
        alpha_M = tl.exp2(m_M - m_safe_M)
        l_M = l_M * alpha_M + tl.sum(p_MN, 1)
        out_ME = tl.dot(p_MN.to(v_NE.dtype), v_NE, out_ME * alpha_M[:, None], input_precision="ieee")
        m_M = m_new_M
    empty_M = l_M == 0.0
    l_safe_M = tl.where(empty_M, 1.0, l_M)
    out_ME /= l_safe_M[:, None]
    row, column = tile * BM + tl.arange(0, BM), tl.arange(0, BE)
    at_M = head * queries + row
    tl.store(
        out_ptr + at_M[:, None] * e + column[None, :], out_ME.to(out_ptr.dtype.element_ty),
        (row < queries)[:, None] & (column < e)[None, :],
    )  # fmt: skip
    lse_M = tl.where(empty_M, float("-inf"), (m_M + tl.log2(l_safe_M)) * 0.6931471805599453)
    tl.store(lse_ptr + at_M, lse_M, row < queries)


def reject(*args: *Args) -> str | None:
    q, _, v, _, block_q, block_k, *_ = args
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"takes float32, bfloat16 and float16, got {q.dtype}"
    if max(q.size(-1), v.size(-1)) > _LONGEST_HEAD:
        return f"takes head dimensions up to {_LONGEST_HEAD}, got {q.size(-1)} and {v.size(-1)}"
    if any(b not in (16, 32, 64, 128) for b in (block_q, block_k)):
        return f"takes blocks of 16, 32, 64 or 128, got block_q={block_q}, block_k={block_k}"
    return None


def lists(block_map: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the chosen blocks of each row in front, int32 [..., rows, columns], and their number, [..., rows]."""
    chosen = block_map > 0
    order = (~chosen).to(torch.int8).sort(dim=-1, stable=True).indices.to(torch.int32)
    return order.contiguous(), chosen.sum(-1, dtype=torch.int32)


def blocks(dtype: torch.dtype, block_q: int, block_k: int, d: int, e: int) -> dict[str, int]:
    """Sizes of blocks and tiles, and how to run them."""
    wide = dtype == torch.float32
    return {
        "QB": block_q,
        "KB": block_k,
        "BM": min(block_q, 64),
        "BN": min(block_k, 32 if wide else 64),
        "BD": max(16, triton.next_power_of_2(d)),
        "BE": max(16, triton.next_power_of_2(e)),
        "num_warps": 8 if wide or max(d, e) > 64 else 4,
        "num_stages": 1 if wide else 2,
    }


def run(*args: *Args) -> tuple[Tensor, Tensor]:
    """As the reference."""
    q, k, v, block_map, block_q, block_k, scale = args
    out = q.new_empty(*q.shape[:-1], v.size(-1))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    index, count = lists(block_map)
    tm, tn = block_map.shape[-2:]
    block = blocks(q.dtype, block_q, block_k, q.size(3), v.size(3))
    _forward_kernel[(triton.cdiv(q.size(2), block["BM"]), q.size(0) * q.size(1))](
        q.contiguous(), k.contiguous(), v.contiguous(), index, count, out, lse, scale * _LOG2E, q.size(1), k.size(1),
        q.size(2), k.size(2), q.size(3), v.size(3), tm, tn,
        WIDEN=INTERPRET, **block,
    )  # fmt: skip
    return out, lse


def aot_cases(kernel: Any, floats: tuple[str, ...], tensors: tuple[str, ...], sizes_of: Any = blocks) -> list[AotCase]:
    """A kernel for several dtypes and head dimensions."""
    cases = []
    sizes = ("heads", "groups", "queries", "keys", "d", "e", "tm", "tn")
    for name, dtype, block, d in (
        ("bf16", torch.bfloat16, 64, 64),
        ("bf16", torch.bfloat16, 64, 128),
        ("fp16", torch.float16, 32, 64),
        ("bf16", torch.bfloat16, 128, 64),
        ("fp32", torch.float32, 32, 64),
    ):
        config = sizes_of(dtype, block, block, d, d)
        options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
        pointers = {**dict.fromkeys(tensors, f"*{name}"), **dict.fromkeys(floats, "*fp32")}
        integers = tuple(s for s in sizes if s in kernel.arg_names)
        cases.append(
            AotCase(
                name=f"{kernel.fn.__name__}-{name}-block{block}-d{d}",
                kernel=kernel,
                signature={
                    **pointers,
                    "list_ptr": "*i32",
                    "count_ptr": "*i32",
                    "scale": "fp32",
                    **dict.fromkeys(integers, "i32"),
                },
                constexprs={"WIDEN": False, **config},
                options=options,
                mma=None if name == "fp32" else "any",
                unaligned=tuple(n for n in integers if n not in "de"),
            )
        )
    return cases


AOT_CASES = aot_cases(_forward_kernel, ("lse_ptr",), ("q_ptr", "k_ptr", "v_ptr", "out_ptr"))

"""Triton kernels of block-sparse attention, backward. Not yet run on a GPU: compiled and interpreted only.

Two passes without atomics: one over the blocks of queries for dQ, one over the blocks of keys for dK and dV, along the
columns of the map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET
from eff_kernels.ops.block_sparse_attention import triton as forward
from eff_kernels.ops.block_sparse_attention.args import BackwardArgs
from eff_kernels.ops.block_sparse_attention.triton import load_rows

_LOG2E = 1.4426950408889634


@triton.jit
def _weights(q_MD, k_ND, g_ME, v_NE, lse_M, delta_M, exists_N, scale):
    """Weights of a pair of blocks and the gradient of their scores, [M, N]."""
    score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
    weight_MN = tl.where(exists_N[None, :], tl.exp2(score_MN - lse_M[:, None]), 0.0)
    back_MN = tl.dot(g_ME, tl.trans(v_NE), input_precision="ieee")
    return weight_MN, weight_MN * (back_MN - delta_M[:, None])


@triton.jit
def _rows_of_queries(lse_ptr, delta_ptr, first, queries, R: tl.constexpr):
    """lse in units of log 2 and delta of a block of queries; without a query or a key, all weights are 0."""
    row = first + tl.arange(0, R)
    lse_M = tl.load(lse_ptr + row, row < queries, other=float("-inf"))
    lse_M = tl.where(lse_M == float("-inf"), float("inf"), lse_M * 1.4426950408889634)
    return lse_M, tl.load(delta_ptr + row, row < queries, other=0.0)


@triton.jit
def _queries_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, list_ptr, count_ptr, dq_ptr, scale, heads, groups, queries,
    keys, d, e, tm, tn,
    QB: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    m, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv = head // heads * groups + head % heads // (heads // groups)
    q_MD = load_rows(q_ptr + head * queries * d, m * BM, d, queries, d, BM, BD, WIDEN)
    g_ME = load_rows(grad_ptr + head * queries * e, m * BM, e, queries, e, BM, BE, WIDEN)
    lse_M, delta_M = _rows_of_queries(lse_ptr + head * queries, delta_ptr + head * queries, m * BM, queries, BM)
    row_of_map = head * tm + m * BM // QB
    list_ptr += row_of_map * tn
    dq_MD = tl.zeros([BM, BD], tl.float32)
    PARTS: tl.constexpr = KB // BN
    for i in range(tl.load(count_ptr + row_of_map) * PARTS):
        first = tl.load(list_ptr + i // PARTS) * KB + i % PARTS * BN
        k_ND = load_rows(k_ptr + kv * keys * d, first, d, keys, d, BN, BD, WIDEN)
        v_NE = load_rows(v_ptr + kv * keys * e, first, e, keys, e, BN, BE, WIDEN)
        exists_N = first + tl.arange(0, BN) < keys
        _, ds_MN = _weights(q_MD, k_ND, g_ME, v_NE, lse_M, delta_M, exists_N, scale)
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision="ieee")
    row, column = m * BM + tl.arange(0, BM), tl.arange(0, BD)
    at = (head * queries + row)[:, None] * d + column[None, :]
    value = (dq_MD * (scale * 0.6931471805599453)).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + at, value, (row < queries)[:, None] & (column < d)[None, :])


@triton.jit
def _keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, list_ptr, count_ptr, dk_ptr, dv_ptr, scale, heads, groups,
    queries, keys, d, e, tm, tn,
    QB: tl.constexpr, KB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    n, kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = heads // groups
    k_ND = load_rows(k_ptr + kv * keys * d, n * BN, d, keys, d, BN, BD, WIDEN)
    v_NE = load_rows(v_ptr + kv * keys * e, n * BN, e, keys, e, BN, BE, WIDEN)
    exists_N = n * BN + tl.arange(0, BN) < keys
    dk_ND = tl.zeros([BN, BD], tl.float32)
    dv_NE = tl.zeros([BN, BE], tl.float32)
    PARTS: tl.constexpr = QB // BM
    for h in range(group):
        head = kv // groups * heads + kv % groups * group + h
        column = head * tn + n * BN // KB
        for i in range(tl.load(count_ptr + column) * PARTS):
            first = tl.load(list_ptr + column * tm + i // PARTS) * QB + i % PARTS * BM
            q_MD = load_rows(q_ptr + head * queries * d, first, d, queries, d, BM, BD, WIDEN)
            g_ME = load_rows(grad_ptr + head * queries * e, first, e, queries, e, BM, BE, WIDEN)
            lse_M, delta_M = _rows_of_queries(lse_ptr + head * queries, delta_ptr + head * queries, first, queries, BM)
            weight_MN, ds_MN = _weights(q_MD, k_ND, g_ME, v_NE, lse_M, delta_M, exists_N, scale)
            dv_NE = tl.dot(tl.trans(weight_MN.to(g_ME.dtype)), g_ME, dv_NE, input_precision="ieee")
            dk_ND = tl.dot(tl.trans(ds_MN.to(q_MD.dtype)), q_MD, dk_ND, input_precision="ieee")
    row = n * BN + tl.arange(0, BN)
    d_D, e_E = tl.arange(0, BD), tl.arange(0, BE)
    value_ND = (dk_ND * (scale * 0.6931471805599453)).to(dk_ptr.dtype.element_ty)
    at_N = (kv * keys + row)[:, None]
    tl.store(dk_ptr + at_N * d + d_D[None, :], value_ND, exists_N[:, None] & (d_D < d)[None, :])
    value_NE = dv_NE.to(dv_ptr.dtype.element_ty)
    tl.store(dv_ptr + at_N * e + e_E[None, :], value_NE, exists_N[:, None] & (e_E < e)[None, :])


def blocks(dtype: torch.dtype, block_q: int, block_k: int, d: int, e: int) -> dict[str, int]:
    """Sizes of blocks and tiles, and how to run them."""
    wide = dtype == torch.float32
    side = 32 if wide or max(d, e) > 64 else 64
    tiles = {"BM": min(block_q, side), "BN": min(block_k, side), "num_warps": 4 if wide else 8, "num_stages": 1}
    return {**forward.blocks(dtype, block_q, block_k, d, e), **tiles}


def reject(*args: *BackwardArgs) -> str | None:
    _, _, q, k, v, block_map, *_, block_q, block_k, scale = args
    return forward.reject(q, k, v, block_map, block_q, block_k, scale)


def run(*args: *BackwardArgs) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    grad, grad_lse, q, k, v, block_map, out, lse, block_q, block_k, scale = args
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = (grad.float() * out.float()).sum(-1) - grad_lse.float()
    q, k, v, grad, lse, delta = (t.contiguous() for t in (q, k, v, grad.to(q.dtype), lse, delta))
    tm, tn = block_map.shape[-2:]
    sizes = (scale * _LOG2E, q.size(1), k.size(1), q.size(2), k.size(2), q.size(3), v.size(3), tm, tn)
    block = blocks(q.dtype, block_q, block_k, q.size(3), v.size(3))
    common = (q, k, v, grad, lse, delta)
    if dq.numel():
        grid = (triton.cdiv(q.size(2), block["BM"]), q.size(0) * q.size(1))
        _queries_kernel[grid](*common, *forward.lists(block_map), dq, *sizes, WIDEN=INTERPRET, **block)
    if dk.numel() or dv.numel():
        columns = forward.lists(block_map.mT)
        grid = (triton.cdiv(k.size(2), block["BN"]), k.size(0) * k.size(1))
        _keys_kernel[grid](*common, *columns, dk, dv, *sizes, WIDEN=INTERPRET, **block)
    return dq, dk, dv


_FLOATS = ("lse_ptr", "delta_ptr")
_TENSORS = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr")
AOT_CASES = [
    *forward.aot_cases(_queries_kernel, _FLOATS, (*_TENSORS, "dq_ptr"), blocks),
    *forward.aot_cases(_keys_kernel, _FLOATS, (*_TENSORS, "dk_ptr", "dv_ptr"), blocks),
]

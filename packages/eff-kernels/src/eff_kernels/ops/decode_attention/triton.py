"""Triton kernels of decode_attention. Not yet run on a GPU: compiled and interpreted only.

One program takes the query heads of one key-value head and a chunk of the keys, so that a long cache occupies the whole
GPU with a batch of one; a second kernel joins the chunks (Dao et al. 2023, flash decoding). How a sequence is cut
depends on the room of the cache alone: its result does not depend on the rest of the batch.

G: query heads of a key-value head, padded to what the matrix units take. S: keys of a block. D: features, padded to a
power of two. C: chunks.

m, l, alpha, p: running maximum and sum of the online softmax, the factor of what came before, and the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from eff_kernels.aot import INTERPRET, AotCase
from eff_kernels.ops.decode_attention.args import Args, ScoredArgs
from eff_kernels.ops.decode_attention.common import check_cache, max_keys, num_blocks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LONGEST_HEAD = 256
_CHUNK, _CHUNKS = 256, 64  # keys of a chunk at least, chunks of a sequence at most
_LOG2E = 1.4426950408889634


@triton.jit
def _decode_chunk_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, table_ptr, table_stride, table_head, parts_ptr, m_ptr, l_ptr,
    weights_ptr, blocks, scale, group, d, chunk,
    page, sequence_stride, entry_stride, head_stride, key_stride,
    PAGED: tl.constexpr, SCORED: tl.constexpr, NARROW: tl.constexpr,
    BG: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    heads = tl.num_programs(1)
    sequence, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row_G, feature_D = tl.arange(0, BG), tl.arange(0, BD)
    mask_GD = (row_G < group)[:, None] & (feature_D < d)[None, :]
    query_G = (sequence * heads + head) * group + row_G
    q_GD = tl.load(q_ptr + query_G[:, None] * d + feature_D[None, :], mask_GD, other=0.0)
    if not NARROW:
        q_GD = q_GD.to(tl.float32)
    length = tl.load(lengths_ptr + sequence)
    first, last = part * chunk, min((part + 1) * chunk, length)
    m_G = tl.full([BG], float("-inf"), tl.float32)
    l_G = tl.zeros([BG], tl.float32)
    out_GD = tl.zeros([BG, BD], tl.float32)
    for start in range(first, last, BS):
        key_S = start + tl.arange(0, BS)
        inside_S = key_S < last
        if PAGED:
            entries_ptr = table_ptr + sequence * table_stride + head * table_head
            number_S = tl.load(entries_ptr + key_S // page, inside_S, other=0)
            row_S = sequence * sequence_stride + number_S.to(tl.int64) * entry_stride + (key_S % page) * key_stride
        else:
            row_S = sequence * sequence_stride + key_S.to(tl.int64) * key_stride
        offset_SD = (row_S + head.to(tl.int64) * head_stride)[:, None] + feature_D[None, :]
        mask_SD = inside_S[:, None] & (feature_D < d)[None, :]
        k_SD = tl.load(k_ptr + offset_SD, mask_SD, other=0.0).to(q_GD.dtype)
        score_GS = tl.dot(q_GD, tl.trans(k_SD), input_precision="ieee") * scale  # in units of log 2
        score_GS = tl.where(inside_S[None, :], score_GS, float("-inf"))
        m_new_G = tl.maximum(m_G, tl.max(score_GS, 1))
        p_GS = tl.exp2(score_GS - m_new_G[:, None])
        alpha_G = tl.exp2(m_G - m_new_G)
        l_block_G = tl.sum(p_GS, 1)
        l_G = l_G * alpha_G + l_block_G
        if SCORED:
            tl.store(weights_ptr + query_G * blocks + start // BS, m_new_G + tl.log2(l_block_G), row_G < group)
        v_SD = tl.load(v_ptr + offset_SD, mask_SD, other=0.0).to(q_GD.dtype)
        out_GD = tl.dot(p_GS.to(q_GD.dtype), v_SD, out_GD * alpha_G[:, None], input_precision="ieee")
        m_G = m_new_G
    place_G = query_G * tl.num_programs(2) + part
    tl.store(parts_ptr + place_G[:, None] * d + feature_D[None, :], out_GD, mask_GD)
    tl.store(m_ptr + place_G, m_G, row_G < group)
    tl.store(l_ptr + place_G, l_G, row_G < group)


@triton.jit
def _join_chunks_kernel(
    parts_ptr, m_ptr, l_ptr, lengths_ptr, out_ptr, heads, d, chunk, chunks, BC: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    feature_D, part_C = tl.arange(0, BD), tl.arange(0, BC)
    used = tl.cdiv(tl.load(lengths_ptr + query // heads), chunk)
    m_C = tl.load(m_ptr + query * chunks + part_C, part_C < used, other=float("-inf"))
    l_C = tl.load(l_ptr + query * chunks + part_C, part_C < used, other=0.0)
    top = tl.where(used > 0, tl.max(m_C, 0), 0.0)
    alpha_C = tl.where(part_C < used, tl.exp2(m_C - top), 0.0)
    total = tl.sum(l_C * alpha_C, 0)
    out_D = tl.zeros([BD], tl.float32)
    for part in range(used):
        share = tl.exp2(tl.load(m_ptr + query * chunks + part) - top)
        row_D = tl.load(parts_ptr + (query * chunks + part) * d + feature_D, feature_D < d, other=0.0)
        out_D += row_D * share
    out_D /= tl.where(used > 0, total, 1.0)
    tl.store(out_ptr + query * d + feature_D, out_D.to(out_ptr.dtype.element_ty), feature_D < d)


def reject(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, *options: float) -> str | None:
    if q.dtype not in _DTYPES or k.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, got q {q.dtype} and cache {k.dtype}"
    if q.size(2) > _LONGEST_HEAD:
        return f"takes head dimensions up to {_LONGEST_HEAD}, got {q.size(2)}"
    if k.stride() != v.stride() or k.stride(3) != 1:
        seen = f"{k.stride()} and {v.stride()}"
        return f"needs keys and values with equal strides and a contiguous last dimension, got strides {seen}"
    return None


def reject_scored(*args: *ScoredArgs) -> str | None:
    q, k, v, lengths, block_table, _, score_block, *_ = args
    step = _block(q.size(1) // k.size(1), q.size(2), q.dtype)["BS"]
    if score_block % step:
        return f"takes blocks of multiples of {step} keys here, got score_block={score_block}"
    if q.dtype == torch.float32 and q.size(2) > 128:  # spills registers
        return f"takes float32 heads up to 128, got {q.size(2)}"
    return reject(q, k, v, lengths, block_table)


def run(*args: *Args) -> Tensor:
    """As the reference."""
    q, k, v, lengths, block_table, run, scale = args
    return _attend(q, k, v, lengths, block_table, run, scale, None)


def run_scored(*args: *ScoredArgs) -> tuple[Tensor, Tensor]:
    """As the reference. The kernel leaves the logarithm of the weight of each of its blocks."""
    q, k, v, lengths, block_table, run, score_block, scale = args
    batch, heads, kv_heads = q.size(0), q.size(1), k.size(1)
    step = _block(heads // kv_heads, q.size(2), q.dtype)["BS"]
    blocks = num_blocks(k, block_table, run, score_block)
    shape = batch, heads, blocks * (score_block // step)
    weights = torch.full(shape, -torch.inf, dtype=torch.float32, device=q.device)
    out = _attend(q, k, v, lengths, block_table, run, scale, weights)
    shares = torch.softmax(weights / _LOG2E, -1).masked_fill(lengths[:, None, None] == 0, 0.0)
    return out, shares.view(batch, kv_heads, heads // kv_heads, blocks, score_block // step).sum((2, 4))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, run: int, scale: float,
    weights: Tensor | None,
) -> Tensor:  # fmt: skip
    if lengths.is_cpu:  # under the interpreter; on a GPU, looking at the values would stall the stream
        check_cache(k, lengths, block_table, run)
    batch, heads, d = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    most = max_keys(k, block_table, run)
    if out.numel() == 0 or most == 0:
        return out.zero_()
    q, lengths = q.contiguous(), lengths.contiguous()
    table = lengths if block_table is None else block_table.contiguous()
    group = heads // k.size(1)
    block = _block(group, d, q.dtype)
    chunk = max(_CHUNK, triton.cdiv(triton.cdiv(most, _CHUNKS), block["BS"]) * block["BS"])
    chunks = triton.cdiv(most, chunk)
    parts = torch.empty(batch, heads, chunks, d, dtype=torch.float32, device=q.device)
    maxima, sums = torch.empty(2, batch, heads, chunks, dtype=torch.float32, device=q.device)
    page_stride, head_stride, key_stride, _ = k.stride()
    inner = run or block_table is None  # entries lie inside of the sequence's own part of the cache
    _decode_chunk_kernel[(batch, k.size(1), chunks)](
        q, k, v, lengths, table, table.stride(0), table.stride(1) if table.dim() == 3 else 0, parts, maxima, sums,
        maxima if weights is None else weights, 0 if weights is None else weights.size(2),
        scale * _LOG2E, group, d, chunk,
        run or k.size(2), page_stride if inner else 0, key_stride if inner else page_stride, head_stride, key_stride,
        PAGED=block_table is not None, SCORED=weights is not None, NARROW=q.dtype == k.dtype and not INTERPRET, **block,
    )  # fmt: skip
    _join_chunks_kernel[(batch * heads,)](
        parts, maxima, sums, lengths, out, heads, d, chunk, chunks,
        BC=triton.next_power_of_2(chunks), BD=block["BD"], num_warps=1,
    )  # fmt: skip
    return out


def _block(group: int, d: int, dtype: torch.dtype) -> dict[str, int]:
    width = max(16, triton.next_power_of_2(d))
    rows = max(16, triton.next_power_of_2(group))
    if dtype == torch.float32:  # multiplied without matrix units, which takes many registers
        return {"BG": rows, "BS": 16, "BD": width, "num_warps": 8 if width > 128 else 4, "num_stages": 1}
    return {"BG": rows, "BS": 32 if width > 128 else 64, "BD": width, "num_warps": 4, "num_stages": 2}


def _aot_cases() -> list[AotCase]:
    cases = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for group, d in ((3, 64), (4, 128), (8, 256)):
            for is_paged, is_scored in ((False, False), (True, False), (True, True)):
                if is_scored and name == "fp32" and d > 128:
                    continue
                block: dict[str, Any] = _block(group, d, dtype)
                options = {key: block.pop(key) for key in ("num_warps", "num_stages")}
                pointers = {
                    "q_ptr": f"*{name}", "k_ptr": f"*{name}", "v_ptr": f"*{name}", "lengths_ptr": "*i32",
                    "table_ptr": "*i32", "parts_ptr": "*fp32", "m_ptr": "*fp32", "l_ptr": "*fp32",
                    "weights_ptr": "*fp32",
                }  # fmt: skip
                odd = ("table_stride", "table_head", "blocks", "group")
                strides = ("sequence_stride", "entry_stride", "head_stride", "key_stride")
                sizes = (*odd, "d", "chunk", "page", *strides)
                cases.append(
                    AotCase(
                        name=f"{name}-{d}-{'paged' if is_paged else 'contiguous'}{'-scored' if is_scored else ''}",
                        kernel=_decode_chunk_kernel,
                        signature={**pointers, **dict.fromkeys(sizes, "i32"), "scale": "fp32"},
                        constexprs={"PAGED": is_paged, "SCORED": is_scored, "NARROW": name != "fp32", **block},
                        options=options,
                        mma=None if name == "fp32" else "any",
                        unaligned=odd,
                    )
                )
    floats = ("parts_ptr", "m_ptr", "l_ptr")
    cases.append(
        AotCase(
            name="join",
            kernel=_join_chunks_kernel,
            signature={
                **dict.fromkeys(floats, "*fp32"), "lengths_ptr": "*i32", "out_ptr": "*bf16",
                **dict.fromkeys(("heads", "d", "chunk", "chunks"), "i32"),
            },
            constexprs={"BC": _CHUNKS, "BD": 128},
            options={"num_warps": 1},
            unaligned=("heads", "chunks"),
        )
    )  # fmt: skip
    return cases


AOT_CASES = _aot_cases()

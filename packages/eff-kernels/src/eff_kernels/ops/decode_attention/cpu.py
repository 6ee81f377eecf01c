"""decode_attention in compiled code: the cache is read once, key-value heads are never expanded."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.decode_attention.args import Args, ScoredArgs
from eff_kernels.ops.decode_attention.common import check_cache, num_blocks

_ARGS = struct.Struct("PqqPPqqqqqqqqqqPqqqPdPPqqq")  # the fields of args in decode_attention.c
_kernel = native.loader("eff_decode_attention", _ARGS)


def reject(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, *options: float) -> str | None:
    """Why the compiled code cannot run this call."""
    if not q.is_cpu:
        return f"needs CPU tensors, got q on {q.device}"
    if q.dtype not in DTYPE_CODES or k.dtype not in DTYPE_CODES:
        return f"takes float32, bfloat16 and float16, got q {q.dtype} and cache {k.dtype}"
    if q.size(2) % 8:
        return f"needs a head dimension divisible by 8, got {q.size(2)}"
    if k.stride() != v.stride() or k.stride(3) != 1:
        seen = f"{k.stride()} and {v.stride()}"
        return f"needs keys and values with equal strides and a contiguous last dimension, got strides {seen}"
    return native.unavailable()


def decode_attention(*args: *Args) -> Tensor:
    """As the reference."""
    q, k, v, lengths, block_table, run, scale = args
    return _attend(q, k, v, lengths, block_table, run, scale, None, 1)


def scored_decode_attention(*args: *ScoredArgs) -> tuple[Tensor, Tensor]:
    """As the reference."""
    q, k, v, lengths, block_table, run, score_block, scale = args
    mass = torch.zeros(q.size(0), k.size(1), num_blocks(k, block_table, run, score_block))
    return _attend(q, k, v, lengths, block_table, run, scale, mass, score_block), mass


def _attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, run: int, scale: float,
    mass: Tensor | None, score_block: int,
) -> Tensor:  # fmt: skip
    if q.stride(2) != 1 or q.stride(1) != q.size(2):  # heads lie side by side; sequences may lie apart
        q = q.contiguous()
    lengths = lengths.contiguous()
    out = q.new_empty(q.shape)
    (batch, heads, d), (pages, kv_heads, page, _) = q.shape, k.shape
    page_stride, head_stride, key_stride, _ = k.stride()
    table = max_pages = per_head = 0
    if block_table is not None:
        block_table = block_table.contiguous()
        table, max_pages, per_head = block_table.data_ptr(), block_table.size(-1), block_table.dim() == 3
    failed = _kernel()(_ARGS.pack(
        q.data_ptr(), DTYPE_CODES[q.dtype], q.stride(0), k.data_ptr(), v.data_ptr(), DTYPE_CODES[k.dtype],
        batch, heads, kv_heads, d, pages, page, page_stride, head_stride, key_stride,
        table, max_pages, per_head, run, lengths.data_ptr(), scale, out.data_ptr(),
        0 if mass is None else mass.data_ptr(), score_block, 0 if mass is None else mass.size(2),
        torch.get_num_threads(),
    ))  # fmt: skip
    if failed == 2:
        check_cache(k, lengths, block_table, run)
    if failed:
        raise MemoryError(f"decode_attention could not allocate scratch memory for q {list(q.shape)}")
    return out

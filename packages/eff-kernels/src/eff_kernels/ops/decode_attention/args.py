"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Args(NamedTuple):
    """Of `decode_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    block_table: Tensor | None
    run: int
    scale: float


class ScoredArgs(NamedTuple):
    """Of `scored_decode_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: Tensor
    block_table: Tensor | None
    run: int
    score_block: int
    scale: float


def check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None, run: int | None) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or k.size(3) != q.size(2):
        raise ValueError(
            f"q [B, H, D], k and v [B, KV, S, D] do not fit: got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    batch, heads, _ = q.shape
    if k.size(1) == 0 or heads % k.size(1):
        raise ValueError(f"the number of query heads, {heads}, must be a multiple of the key-value heads, {k.size(1)}")
    if not (q.is_floating_point() and k.is_floating_point()) or k.dtype != v.dtype:
        raise TypeError(f"q, k and v must have float dtypes, k and v the same; got {q.dtype}, {k.dtype} and {v.dtype}")
    if lengths.dtype != torch.int32 or (block_table is not None and block_table.dtype != torch.int32):
        seen = lengths.dtype if block_table is None else f"{lengths.dtype} and {block_table.dtype}"
        raise TypeError(f"lengths and block_table must be int32, got {seen}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must have shape [{batch}], got {list(lengths.shape)}")
    if run is not None and (run < 1 or block_table is None):
        raise ValueError(f"run must be 1 or more and needs a block_table, got run={run}")
    if (block_table is None or run) and k.size(0) != batch:
        raise ValueError(f"k and v must hold {batch} sequences, as q does, got {k.size(0)}")
    if block_table is not None and block_table.shape[:-1] not in ((batch,), (batch, k.size(1))):
        wanted = f"[{batch}, max_pages] or [{batch}, {k.size(1)}, max_pages]"
        raise ValueError(f"block_table must have shape {wanted}, got {list(block_table.shape)}")

"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_groups


class Args(NamedTuple):
    """Of `block_sparse_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    block_map: Tensor
    block_q: int
    block_k: int
    scale: float


class BackwardArgs(NamedTuple):
    """Of the backward of `block_sparse_attention`."""

    grad: Tensor
    grad_lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    block_map: Tensor
    out: Tensor
    lse: Tensor
    block_q: int
    block_k: int
    scale: float


def check(q: Tensor, k: Tensor, v: Tensor, block_map: Tensor, block_q: int, block_k: int) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q, k, v must be [B, H, L, D], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    if q.size(0) != k.size(0) or k.shape[:3] != v.shape[:3] or q.size(-1) != k.size(-1):
        raise ValueError(
            "q [B, H, Lq, D], k [B, Hkv, Lk, D], v [B, Hkv, Lk, Dv] do not fit: "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    check_groups(q.size(1), k.size(1))
    if not q.is_floating_point() or k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(f"q, k, v must have one float dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if block_q < 1 or block_k < 1:
        raise ValueError(f"blocks must hold at least one token, got block_q={block_q}, block_k={block_k}")
    if block_map.dtype != torch.int8:
        raise TypeError(f"block_map must be int8, got {block_map.dtype}")
    wanted = (q.size(0), q.size(1), -(-q.size(2) // block_q), -(-k.size(2) // block_k))
    if tuple(block_map.shape) != wanted:
        raise ValueError(f"block_map must be {list(wanted)} for these blocks, got {list(block_map.shape)}")
    if any(t.device != q.device for t in (k, v, block_map)):
        raise ValueError(f"all tensors must be on one device, got {[str(t.device) for t in (q, k, v, block_map)]}")

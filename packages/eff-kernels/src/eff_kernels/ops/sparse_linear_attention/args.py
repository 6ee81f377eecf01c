"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.sparse_linear_attention.blocks import check_heads, num_blocks
from eff_kernels.ops.sparse_linear_attention.common import FEATURE_MAPS, LINEAR_SCOPES


class Args(NamedTuple):
    """Of `sparse_linear_attention`."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    block_q: int
    block_k: int
    feature_map: str
    linear_scope: str
    scale: float


class BackwardArgs(NamedTuple):
    """Of the backward of `sparse_linear_attention`."""

    grad_sparse: Tensor
    grad_linear: Tensor
    grad_lse: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    sparse: Tensor
    linear: Tensor
    lse: Tensor
    block_q: int
    block_k: int
    feature_map: str
    linear_scope: str
    scale: float


def check(*args: *Args) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    q, k, v, mask, block_q, block_k, feature_map, linear_scope, _ = args
    check_heads(q, k)
    if v.is_nested or v.layout != torch.strided:
        raise TypeError("sparse-linear attention takes dense tensors, got a sparse or nested one")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv] do not fit: got {list(k.shape)}, {list(v.shape)}")
    if v.dtype != q.dtype or v.device != q.device:
        raise TypeError(f"v must be like q, {q.dtype} on {q.device}, got {v.dtype} on {v.device}")
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
    wanted = [*q.shape[:2], num_blocks(q.size(2), block_q), num_blocks(k.size(2), block_k)]
    if list(mask.shape) != wanted:
        raise ValueError(
            f"the mask must be {wanted} for {q.size(2)} queries in blocks of {block_q} and {k.size(2)} keys in blocks "
            f"of {block_k}, got {list(mask.shape)}"
        )
    if mask.dtype != torch.int8 or mask.device != q.device:
        raise TypeError(f"the mask must be torch.int8 on {q.device}, got {mask.dtype} on {mask.device}")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"unknown feature_map {feature_map!r}; use one of {FEATURE_MAPS}")
    if linear_scope not in LINEAR_SCOPES:
        raise ValueError(f"unknown linear_scope {linear_scope!r}; use one of {LINEAR_SCOPES}")

"""Scores and weighted sums apart, for models that need the weights: dropout on them, or a bias by relative position.

natten had these until 0.17; ``natten1dqkrpb`` and the like keep its older names and order of arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from eff_kernels.ops.neighborhood_attention.args import check_windows, each_axis
from eff_kernels.ops.neighborhood_attention.common import window_index
from eff_kernels.ops.neighborhood_attention.unfused import AV_OP, QK_OP
from torch import Tensor

Layout = Literal["heads_last", "heads_first"]


def na_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    layout: Layout = "heads_last",
) -> Tensor:
    """Scores of each query and the keys of its window; nothing is scaled.

    Args:
        query: [B, *S, H, D], or [B, H, *S, D] with ``layout="heads_first"``.
        key: Like ``query``; of fewer heads, each of which serves H / Hkv heads of queries.
        kernel_size: Keys in the window; one number, or one an axis.
        stride: Neighbouring queries that share a window.
        dilation: Distance between the keys of a window.
        is_causal: Whether keys after the query are out of sight.
        rpb: Bias by relative position, [H, 2K - 1, ...]: on each axis, key j of query i has entry
            (j - i) / dilation + K - 1. Not with a causal axis.
        additional_keys: [B, M, Hkv, D] or [B, Hkv, M, D]; their scores come after those of the window.
        layout: Where the heads are.

    Returns:
        [B, *S, H, prod(K) + M], or [B, H, *S, prod(K) + M]. Slots are in row-major order of the window. The slots that
        a causal window lacks are minus infinity.
    """
    query, key = _first(query, layout), _first(key, layout)
    key = _share(key, query.size(1), "key")
    if query.shape != key.shape:
        raise ValueError(f"query and key must have one shape, got {list(query.shape)} and {list(key.shape)}")
    windows = _windows(query, kernel_size, stride, dilation, is_causal)
    scores = QK_OP(query, key, *windows)
    if rpb is not None:
        scores = scores + _bias(rpb, query, windows)
    if additional_keys is not None:
        more = additional_keys.transpose(1, 2) if layout == "heads_last" else additional_keys
        more = _share(more, query.size(1), "additional_keys")
        extra = (query.flatten(2, -2) @ more.mT).unflatten(2, query.shape[2:-1])
        scores = torch.cat([scores, extra], -1)
    return _back(scores, layout)


def na_av(
    weights: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    additional_values: Tensor | None = None,
    layout: Layout = "heads_last",
) -> Tensor:
    """Sums of the values of each window, weighted by what came of `na_qk`; the arguments are as there.

    Args:
        weights: [B, *S, H, prod(K) + M], or [B, H, *S, prod(K) + M].
        value: [B, *S, Hkv, D], or [B, Hkv, *S, D]; H must be a multiple of Hkv.
        kernel_size: Keys in the window; one number, or one an axis.
        stride: Neighbouring queries that share a window.
        dilation: Distance between the keys of a window.
        is_causal: Whether keys after the query are out of sight.
        additional_values: [B, M, Hkv, D] or [B, Hkv, M, D].
        layout: Where the heads are.
    """
    weights, value = _first(weights, layout), _first(value, layout)
    value = _share(value, weights.size(1), "value")
    windows = _windows(value, kernel_size, stride, dilation, is_causal)
    slots = len(_index(value, windows)[0])
    extra = 0 if additional_values is None else additional_values.size(1 if layout == "heads_last" else 2)
    if weights.shape != (*value.shape[:-1], slots + extra):
        raise ValueError(f"weights must end in {slots + extra} slots and fit value, got {list(weights.shape)}")
    out = AV_OP(weights[..., :slots], value, *windows)
    if additional_values is not None:
        more = additional_values.transpose(1, 2) if layout == "heads_last" else additional_values
        more = _share(more, weights.size(1), "additional_values")
        out = out + (weights[..., slots:].flatten(2, -2) @ more).unflatten(2, value.shape[2:-1])
    return _back(out, layout)


def _first(x: Tensor, layout: Layout) -> Tensor:
    """Heads first."""
    if layout not in ("heads_last", "heads_first"):
        raise ValueError(f"layout must be 'heads_last' or 'heads_first', got {layout!r}")
    return x.movedim(-2, 1) if layout == "heads_last" else x


def _share(x: Tensor, heads: int, name: str) -> Tensor:
    """Key-value heads once for each query head that they serve."""
    if x.size(1) == heads:
        return x
    if x.size(1) == 0 or heads % x.size(1):
        raise ValueError(f"{name} has {x.size(1)} heads, which do not divide {heads} heads of queries")
    return x.repeat_interleave(heads // x.size(1), 1)


def _back(x: Tensor, layout: Layout) -> Tensor:
    return x.movedim(1, -2) if layout == "heads_last" else x


def _windows(x: Tensor, window: Any, stride: Any, dilation: Any, causal: Any) -> tuple[list[Any], ...]:
    rank = x.dim() - 3
    lists = [each_axis(*args, rank, int) for args in (("kernel_size", window), ("stride", stride))]
    lists += [each_axis("dilation", dilation, rank, int), each_axis("is_causal", causal, rank, bool)]
    check_windows(x.shape[2:-1], *lists[:3])
    return tuple(lists)


def _index(x: Tensor, windows: tuple[list[Any], ...]) -> tuple[Tensor, Tensor]:
    return window_index(tuple(x.shape[2:-1]), *(tuple(w) for w in windows))


def _bias(rpb: Tensor, query: Tensor, windows: tuple[list[Any], ...]) -> Tensor:
    """Rpb of each query and slot, [H, *S, slots]."""
    window, _, dilation, causal = windows
    if any(causal):
        raise ValueError("rpb cannot be used with a causal axis: it has no entries for keys outside the window")
    wanted = (query.size(1), *(2 * k - 1 for k in window))
    if rpb.shape != wanted:
        raise ValueError(f"rpb must have shape {list(wanted)}, got {list(rpb.shape)}")
    index, _ = _index(query, windows)
    key, at = index, torch.arange(index.size(1))
    places, size = torch.zeros_like(index), 1
    for length, k, d in zip(reversed(query.shape[2:-1]), reversed(window), reversed(dilation), strict=True):
        places = places + ((key % length - at % length) // d + k - 1) * size
        size *= 2 * k - 1
        key, at = key // length, at // length
    bias = rpb.flatten(1)[:, places.mT.to(rpb.device)]
    return bias.unflatten(1, query.shape[2:-1])


def _qkrpb(rank: int, query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    if query.dim() != rank + 3:
        raise ValueError(f"natten{rank}dqkrpb takes a query of {rank + 3} dimensions, got {list(query.shape)}")
    return na_qk(query, key, kernel_size, 1, dilation, rpb=rpb, layout="heads_first")


def _av(rank: int, attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    if value.dim() != rank + 3:
        raise ValueError(f"natten{rank}dav takes a value of {rank + 3} dimensions, got {list(value.shape)}")
    return na_av(attn, value, kernel_size, 1, dilation, layout="heads_first")


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """Scores [B, H, L, K] of query and key [B, H, L, D], with a bias [H, 2K - 1] by relative position."""
    return _qkrpb(1, query, key, rpb, kernel_size, dilation)


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """Scores [B, H, X, Y, K * K] of query and key [B, H, X, Y, D], with a bias [H, 2K - 1, 2K - 1]."""
    return _qkrpb(2, query, key, rpb, kernel_size, dilation)


def natten3dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """Scores [B, H, X, Y, Z, K ** 3] of query and key [B, H, X, Y, Z, D], with a bias [H, 2K - 1, ...]."""
    return _qkrpb(3, query, key, rpb, kernel_size, dilation)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Weighted sums [B, H, L, D] of the values of each window."""
    return _av(1, attn, value, kernel_size, dilation)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Weighted sums [B, H, X, Y, D] of the values of each window."""
    return _av(2, attn, value, kernel_size, dilation)


def natten3dav(attn: Tensor, value: Tensor, kernel_size: int, dilation: int) -> Tensor:
    """Weighted sums [B, H, X, Y, Z, D] of the values of each window."""
    return _av(3, attn, value, kernel_size, dilation)

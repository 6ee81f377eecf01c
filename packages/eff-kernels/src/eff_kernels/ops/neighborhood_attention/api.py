"""neighborhood_attention: checks of the arguments, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.neighborhood_attention import cpu, reference
from eff_kernels.ops.neighborhood_attention.autograd import backward, setup_context


class NeighborhoodAttention(NamedTuple):
    """What `neighborhood_attention` returns.

    Attributes:
        output: [B, *S, H, Dv] of the dtype of the query.
        lse: Logarithm of the sum of the exponentials of the scores, float32 [B, *S, H]; with it results over different
            keys can be joined.
    """

    output: Tensor
    lse: Tensor


def _allocate(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(*query.shape[:-1], value.size(-1)), query.new_empty(query.shape[:-1], dtype=wide)


OP = Op(
    "neighborhood_attention",
    "(Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "
    "float scale, Tensor additional_keys, Tensor additional_values) -> (Tensor, Tensor)",
    [
        Backend("cpu", cpu.neighborhood_attention, cpu.reject),
        triton_backend("eff_kernels.ops.neighborhood_attention.triton"),
        Backend("reference", reference.neighborhood_attention),
    ],
    fake=_allocate,
    setup_context=setup_context,
    backward=backward,
)


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    *,
    backend: str = "auto",
) -> NeighborhoodAttention:
    """Attend from each token of a map to the window of tokens around it.

    output[i] = sum_j softmax_j(scale * query[i] . key[j]) value[j] over the keys j in the window of i on every axis
    (see `eff_kernels.ops.neighborhood_attention.window_bounds`) and over all additional keys, in float32.
    Time and memory are linear in the number of tokens, except on the reference. Differentiable in all tensors, through
    the output and through ``lse``.

    Args:
        query: [B, *S, H, D] with one to three axes S.
        key: [B, *S, Hkv, D] of the same dtype; H must be a multiple of Hkv, and query head h reads key-value head
            h // (H / Hkv).
        value: [B, *S, Hkv, Dv].
        kernel_size: Keys in the window; one number, or one an axis. At least 2, and with the dilation at most the
            length of the axis.
        stride: Neighbouring queries that share a window, at most ``kernel_size``.
        dilation: Distance between the keys of a window.
        is_causal: Whether keys after the query are out of sight.
        scale: Factor of the scores; D ** -0.5 by default.
        additional_keys: [B, M, Hkv, D], which every query sees.
        additional_values: [B, M, Hkv, Dv].
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Raises:
        ValueError: shapes or windows do not fit; the message names the axis, the value and the limit.
        TypeError: a dtype or a kind of tensor is not as stated.
        BackendError: the named backend cannot run this call; the message says why.
    """
    rank = query.dim() - 3
    _check_tensors(query, key, value, additional_keys, additional_values)
    window = each_axis("kernel_size", kernel_size, rank, int)
    step, spacing = each_axis("stride", stride, rank, int), each_axis("dilation", dilation, rank, int)
    causal = each_axis("is_causal", is_causal, rank, bool)
    check_windows(query.shape[1:-2], window, step, spacing)
    if additional_keys is None or additional_values is None:
        additional_keys, additional_values = (t.new_empty(t.size(0), 0, *t.shape[-2:]) for t in (key, value))
    scale = query.size(-1) ** -0.5 if scale is None else float(scale)
    result = OP(
        query, key, value, window, step, spacing, causal, scale, additional_keys, additional_values, backend=backend
    )
    return NeighborhoodAttention(*result)


def each_axis(name: str, value: Any, rank: int, kind: type) -> list[Any]:
    """One value an axis, from one for all or one for each."""
    values = [value] * rank if isinstance(value, kind) else list(value) if isinstance(value, Sequence) else [value]
    if len(values) != rank or any(type(v) is not kind for v in values):
        raise ValueError(f"{name} must be one {kind.__name__}, or one for each of the {rank} axes, got {value!r}")
    return values


def check_windows(shape: Sequence[int], window: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> None:
    """Raise ValueError where a window does not fit its axis."""
    for axis, (length, k, s, d) in enumerate(zip(shape, window, stride, dilation, strict=True)):
        if k < 2:
            raise ValueError(f"kernel_size must be at least 2, got {k} on axis {axis}")
        if not 1 <= s <= k:
            raise ValueError(f"stride must be from 1 to kernel_size = {k}, got {s} on axis {axis}")
        if d < 1:
            raise ValueError(f"dilation must be at least 1, got {d} on axis {axis}")
        if k * d > length:
            raise ValueError(
                f"kernel_size * dilation = {k} * {d} must be at most the length of the axis, {length}, on axis {axis}"
            )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, more_k: Tensor | None, more_v: Tensor | None) -> None:
    tensors = [t for t in (q, k, v, more_k, more_v) if t is not None]
    if any(t.is_nested or t.layout != torch.strided for t in tensors):
        raise TypeError("neighborhood attention takes dense tensors, got a sparse or nested one")
    shapes = f"{list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
    if not 4 <= q.dim() <= 6:
        raise ValueError(f"query must be [B, *S, H, D] with one to three axes S, got {list(q.shape)}")
    if k.shape[:-1] != v.shape[:-1] or q.shape[:-2] != k.shape[:-2] or q.size(-1) != k.size(-1):
        raise ValueError(f"query [B, *S, H, D], key [B, *S, Hkv, D], value [B, *S, Hkv, Dv] do not fit: got {shapes}")
    if k.size(-2) == 0 or q.size(-2) % k.size(-2):
        raise ValueError(f"the number of query heads, {q.size(-2)}, must be a multiple of the key heads, {k.size(-2)}")
    if not q.is_floating_point() or any(t.dtype != q.dtype for t in tensors):
        raise TypeError(f"all tensors must have one float dtype, got {[t.dtype for t in tensors]}")
    if any(t.device != q.device for t in tensors):
        raise ValueError(f"all tensors must be on one device, got {[str(t.device) for t in tensors]}")
    if (more_k is None) != (more_v is None):
        raise ValueError("additional_keys and additional_values go together, got one of them")
    if more_k is None or more_v is None:
        return
    wanted = [(k.size(0), more_k.size(1) if more_k.dim() == 4 else -1, *t.shape[-2:]) for t in (k, v)]
    if [tuple(more_k.shape), tuple(more_v.shape)] != wanted:
        raise ValueError(
            f"additional_keys and additional_values must be [{k.size(0)}, M, {k.size(-2)}, {k.size(-1)}] and "
            f"[{v.size(0)}, M, {v.size(-2)}, {v.size(-1)}], got {list(more_k.shape)} and {list(more_v.shape)}"
        )

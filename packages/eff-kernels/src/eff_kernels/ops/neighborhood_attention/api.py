"""neighborhood_attention: checks of the arguments, then dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, schema_of, triton_backend
from eff_kernels.ops.neighborhood_attention import cpu, reference
from eff_kernels.ops.neighborhood_attention.args import Args, check_tensors, check_windows, each_axis
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
    schema_of(Args, "(Tensor, Tensor)"),
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
    check_tensors(query, key, value, additional_keys, additional_values)
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

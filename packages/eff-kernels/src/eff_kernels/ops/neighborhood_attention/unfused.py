"""The two halves of neighborhood attention, with the weights in between: qk and av (sections 3 and 4 of the paper).

Three products of windows give both halves and all their gradients, so that any number of derivatives exists:

    qk       s[i, t] = q[i] . k[j(i, t)]            dq = av(ds, k)     dk = inverse(ds, q)
    av       o[i] = sum_t w[i, t] v[j(i, t)]        dw = qk(do, v)     dv = inverse(w, do)
    inverse  x[j] = sum over i, t with j(i, t) = j of w[i, t] q[i]     dw = qk(q, dx)     dq = av(w, dx)

j(i, t) is key t of the window of i in row-major order. The slots that a causal window lacks come last; their scores are
minus infinity and their weights count as zero. Memory is that of the weights, [B, H, *S, slots], and no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op
from eff_kernels.ops.neighborhood_attention import unfused_cpu as cpu
from eff_kernels.ops.neighborhood_attention.common import window_index


def _index(x: Tensor, *windows: Sequence[Any]) -> tuple[Tensor, Tensor]:
    shape = tuple(x.shape[2:-1])
    index, there = window_index(shape, *(tuple(w) for w in windows))
    return index.to(x.device), there.to(x.device)


def qk(query: Tensor, key: Tensor, *windows: Sequence[Any]) -> Tensor:
    """Scores of each query and the keys of its window, [B, H, *S, slots]."""
    index, there = _index(query, *windows)
    q, k = query.flatten(2, -2), key.flatten(2, -2)
    scores = q.new_empty(*q.shape[:-1], len(index))
    for slot, (at, inside) in enumerate(zip(index, there, strict=True)):
        scores[..., slot] = (q * k[:, :, at]).sum(-1).masked_fill(~inside, -torch.inf)
    return scores.unflatten(2, query.shape[2:-1])


def av(weights: Tensor, value: Tensor, *windows: Sequence[Any]) -> Tensor:
    """Weighted sums of the values of each window, [B, H, *S, D]."""
    index, there = _index(value, *windows)
    w, v = weights.flatten(2, -2), value.flatten(2, -2)
    out = torch.zeros_like(v, memory_format=torch.contiguous_format)
    for slot, (at, inside) in enumerate(zip(index, there, strict=True)):
        out += w[..., slot].masked_fill(~inside, 0)[..., None] * v[:, :, at]
    return out.unflatten(2, value.shape[2:-1])


def inverse(weights: Tensor, rows: Tensor, *windows: Sequence[Any]) -> Tensor:
    """For each key, the weighted sum of the rows of all queries whose window has it, [B, H, *S, D]."""
    index, there = _index(rows, *windows)
    w, x = weights.flatten(2, -2), rows.flatten(2, -2)
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for slot, (at, inside) in enumerate(zip(index, there, strict=True)):
        out.index_add_(2, at, w[..., slot].masked_fill(~inside, 0)[..., None] * x)
    return out.unflatten(2, rows.shape[2:-1])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.windows = inputs[2:]


def _gradients(ctx: Any, first: Any, second: Any) -> tuple[Any, ...]:
    """The gradients that are wanted, computed by the given functions of the two saved tensors."""
    a, b = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (first(a, b) if wanted[0] else None, second(a, b) if wanted[1] else None, None, None, None, None)


def _qk_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, lambda q, k: AV_OP(grad, k, *ctx.windows), lambda q, k: INVERSE_OP(grad, q, *ctx.windows))


def _finite_qk(query: Tensor, key: Tensor, *windows: Any) -> Tensor:
    """Qk as a gradient: a slot without a key has none."""
    scores = QK_OP(query, key, *windows)
    return scores.masked_fill(scores == -torch.inf, 0) if any(windows[3]) else scores


def _av_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gradients(
        ctx, lambda w, v: _finite_qk(grad, v, *ctx.windows), lambda w, v: INVERSE_OP(w, grad, *ctx.windows)
    )


def _inverse_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _gradients(ctx, lambda w, x: _finite_qk(x, grad, *ctx.windows), lambda w, x: AV_OP(w, grad, *ctx.windows))


_WINDOWS = "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal"

QK_OP = Op(
    "neighborhood_qk",
    f"(Tensor query, Tensor key, {_WINDOWS}) -> Tensor",
    [Backend("cpu", cpu.qk, cpu.reject), Backend("reference", qk)],
    fake=lambda query, key, window, *_: query.new_empty(*query.shape[:-1], math.prod(window)),
    setup_context=_remember,
    backward=_qk_backward,
)

AV_OP = Op(
    "neighborhood_av",
    f"(Tensor weights, Tensor value, {_WINDOWS}) -> Tensor",
    [Backend("cpu", cpu.av, cpu.reject), Backend("reference", av)],
    fake=lambda weights, value, *_: value.new_empty(value.shape),
    setup_context=_remember,
    backward=_av_backward,
)

INVERSE_OP = Op(
    "neighborhood_inverse",
    f"(Tensor weights, Tensor rows, {_WINDOWS}) -> Tensor",
    [Backend("cpu", cpu.inverse, cpu.reject), Backend("reference", inverse)],
    fake=lambda weights, rows, *_: rows.new_empty(rows.shape),
    setup_context=_remember,
    backward=_inverse_backward,
)

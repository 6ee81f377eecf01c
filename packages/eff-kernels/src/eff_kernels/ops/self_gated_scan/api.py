"""self_gated_scan: checks of the arguments, then dispatch; its backward is an op of its own, with backends."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, triton_backend
from eff_kernels.ops.self_gated_scan import cpu, reference


class SelfGatedScanOutput(NamedTuple):
    """What `self_gated_scan` returns.

    Attributes:
        output: [B, H, T, Dv] of the dtype of v.
        state: [B, H, Dv + 2] in float32 if it was asked for, else None: the running mean, the sum of the exponentials
            of the scores below the highest, and the highest score.
    """

    output: Tensor
    state: Tensor | None


BACKWARD_OP = Op(
    "self_gated_scan_backward",
    "(Tensor grad, Tensor score, Tensor v, Tensor out, Tensor tops, Tensor totals, Tensor? state) -> (Tensor, Tensor)",
    [
        Backend("cpu", cpu.self_gated_scan_backward, cpu.reject_backward),
        triton_backend("eff_kernels.ops.self_gated_scan.triton", run="backward", reject="reject_backward"),
        Backend("reference", reference.self_gated_scan_backward),
    ],
    fake=lambda grad, score, v, *_: (score.new_empty(score.shape), v.new_empty(v.shape)),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    score, v, state, _ = inputs
    out, tops, totals, final = output
    ctx.save_for_backward(score, v, out, tops, totals, state)
    ctx.mark_non_differentiable(tops, totals, final)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = BACKWARD_OP(grad.contiguous(), *ctx.saved_tensors, backend=ctx.backend)
    return (*(g if w else None for g, w in zip(gradients, ctx.needs_input_grad[:2], strict=True)), None, None)


def _allocate(score: Tensor, v: Tensor, state: Any, keep: bool) -> tuple[Tensor, ...]:
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (score.size(0), score.size(1), v.size(-1) + 2) if keep else (0,)
    tops, totals, final = (score.new_empty(s, dtype=wide) for s in (score.shape, score.shape, shape))
    return v.new_empty(*score.shape, v.size(-1)), tops, totals, final


OP = Op(
    "self_gated_scan",
    "(Tensor score, Tensor v, Tensor? state, bool return_state) -> (Tensor, Tensor, Tensor, Tensor)",
    [
        Backend("cpu", cpu.self_gated_scan, cpu.reject),
        triton_backend("eff_kernels.ops.self_gated_scan.triton"),
        Backend("reference", reference.self_gated_scan),
    ],
    fake=_allocate,
    setup_context=_setup_context,
    backward=_backward,
)


def self_gated_scan(
    score: Tensor, v: Tensor, *, state: Tensor | None = None, return_state: bool = False, backend: str = "auto"
) -> SelfGatedScanOutput:
    """Mean of all values up to each token, weighted by the exponential of a score that belongs to the value.

    output[i] = sum_{j <= i} exp(score[j]) v[j] / sum_{j <= i} exp(score[j]), in float32, by a running mean: time is
    linear in the tokens, and no exponential is taken of a positive number, so that scores may be of any size.

    Args:
        score: [B, H, T] of any float dtype; -inf hides a key. A token with no key to see gives zeros.
        v: [B, Hkv, T, Dv]; H must be a multiple of Hkv, and head h reads the values of h // (H / Hkv).
        state: That of an earlier call, over the tokens before these. It is not changed, and carries no gradient.
        return_state: Whether to return the state after these tokens.
        backend: "auto", "cpu", "triton" or "reference". A named backend runs or raises; it never falls back.

    Raises:
        ValueError: shapes do not fit, or the state requires a gradient.
        TypeError: a dtype is not as stated.
        BackendError: the named backend cannot run this call; the message says why.
    """
    _check(score, v, state)
    out, _, _, final = OP(score, v, state, return_state, backend=backend)
    return SelfGatedScanOutput(out, final if return_state else None)


def _check(score: Tensor, v: Tensor, state: Tensor | None) -> None:
    fits = score.dim() == 3 and v.dim() == 4 and (score.size(0), score.size(2)) == (v.size(0), v.size(2))
    if not fits or v.size(1) == 0 or score.size(1) % v.size(1):
        raise ValueError(
            "score must be [B, H, T] and v [B, Hkv, T, Dv] with H a multiple of Hkv, "
            f"got {list(score.shape)} and {list(v.shape)}"
        )
    if not (score.is_floating_point() and v.is_floating_point()):
        raise TypeError(f"score and v must have float dtypes, got {score.dtype} and {v.dtype}")
    if state is None:
        return
    wanted = [*score.shape[:2], v.size(-1) + 2]
    if list(state.shape) != wanted:
        raise ValueError(f"state must be {wanted} for these scores and values, got {list(state.shape)}")
    if state.requires_grad:
        raise ValueError("state carries no gradient, got one that requires it; detach it")

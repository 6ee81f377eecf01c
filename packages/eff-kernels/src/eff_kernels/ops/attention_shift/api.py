"""scale_weights and move_weights: the output of causal attention, changed as if the weights of some keys had been.

o' = f o + sum of (w' - f w) v over these keys: with the log-sum-exp of each query, which the kernel that made the
output has left, only these keys are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eff_kernels.op import Backend, Op, needs_torch_dispatch, schema_of
from eff_kernels.ops.attention_shift import cpu, reference
from eff_kernels.ops.attention_shift.args import MoveArgs, ScaleArgs, check_move, check_scale
from eff_kernels.ops.attention_shift.common import like

SCALE_OP = Op(
    "scale_weights",
    schema_of(ScaleArgs, "Tensor"),
    [Backend("cpu", cpu.scale_weights, cpu.reject), Backend("reference", reference.scale_weights)],
    fake=lambda *args: like(args[3]),
)
MOVE_OP = Op(
    "move_weights",
    schema_of(MoveArgs, "(Tensor, Tensor)"),
    [Backend("cpu", cpu.move_weights, cpu.reject), Backend("reference", reference.move_weights)],
    fake=lambda q, k, v, out, *_: (like(out), q.new_empty((*q.shape[:2], 2), dtype=torch.float64)),
)


@dataclass(frozen=True)
class Attended:
    """Causal attention that was computed: query i sees S - Sq + i + 1 keys.

    Attributes:
        q: [B, H, Sq, D]; any float dtype, which k, v and out share.
        k: [B, KV, S, D]; query head h reads key head h // (H / KV).
        v: [B, KV, S, Dv].
        out: What came out [B, H, Sq, Dv].
        lse: Log-sum-exp of the scores of each query, float32 [B, H, Sq].
        scale: Factor of the scores.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float


def can_shift(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether compiled code reads queries, keys and values as they lie: CPU tensors of one float type, no gradient.

    Elsewhere the reference computes all weights, so that attention with changed weights takes no longer.
    """
    return (
        cpu.reject(q) is None
        and k.is_cpu
        and v.is_cpu
        and q.dtype is k.dtype is v.dtype
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and not needs_torch_dispatch((q, k, v))
    )


def scale_weights(
    attended: Attended, columns: Tensor, beta: float, heads: Sequence[int] | None = None, *, backend: str = "auto"
) -> Tensor:
    """The output if some keys had ``beta`` times their weight and the others, in proportion, what these lose.

    Has no gradient.

    Args:
        attended: The attention.
        columns: The keys of each head, bool [B, h, S].
        beta: Factor.
        heads: The h query heads; None for all.
        backend: "auto", "cpu" or "reference". A named backend runs or raises; it never falls back.

    Returns:
        [B, H, Sq, Dv]; other heads, and queries that see none of the keys or nothing else, are the same numbers.

    Raises:
        ValueError: shapes do not fit, a head does not exist, or tensors lie on several devices.
        TypeError: queries, keys, values and output are of several dtypes, or ``lse`` is not float32.
        BackendError: the named backend cannot run this call; the message says why.
    """
    a, which = attended, list(range(attended.q.shape[1]) if heads is None else heads)
    check_scale(a.q, a.k, a.v, a.out, a.lse, a.scale, columns, beta, which)
    found: Tensor = SCALE_OP(a.q, a.k, a.v, a.out, a.lse, float(a.scale), columns, float(beta), which, backend=backend)
    return found


def move_weights(
    attended: Attended, receivers: Tensor, givers: Tensor, others: Tensor, asked: Tensor,
    *, share: float, rho: float, least: float, by_sinks: bool, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output if givers had lost a share of their weight to receivers, in the heads that look at a picture.

    A head is changed for a query if the keys of the picture (receivers and ``givers``) have at least ``least`` of its
    weight, and the receivers at least ``rho`` of that. Has no gradient.

    Args:
        attended: The attention.
        receivers: Keys of pictures that get weight, in proportion to what they have, bool [B, S].
        givers: Keys of pictures that lose it.
        others: Further keys that lose it. No key is of two kinds.
        asked: Queries that may be changed, bool [B, Sq].
        share: What givers and others lose, 0 to 1.
        rho: See above.
        least: See above.
        by_sinks: Instead, the givers have at most ``rho`` of the picture's weight, plus 1e-6 for each of its keys.
        backend: As `scale_weights`.

    Returns:
        The output [B, H, Sq, Dv], whose other rows are the same numbers; and the number of queries that were changed
        and the weight that moved, float64 [B, H, 2].

    Raises:
        ValueError, TypeError, BackendError: as `scale_weights`.
    """
    a, numbers = attended, (float(share), float(rho), float(least), bool(by_sinks))
    check_move(a.q, a.k, a.v, a.out, a.lse, a.scale, receivers, givers, others, asked, *numbers)
    found: tuple[Tensor, Tensor] = MOVE_OP(
        a.q, a.k, a.v, a.out, a.lse, float(a.scale), receivers, givers, others, asked, *numbers, backend=backend
    )
    return found

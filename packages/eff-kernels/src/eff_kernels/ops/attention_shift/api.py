"""scale_weights and move_weights: the output of causal attention, changed as if the weights of some keys had been.

o' = f o + sum of (w' - f w) v over these keys: with the log-sum-exp of each query, which the kernel that made the
output has left, only these keys are looked at. Compiled code alone; ask `can_shift` first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.op import needs_torch_dispatch

_ARGS = struct.Struct("PqqqPqqqPqqqPqqqPqqqqqqqqqqqPqPPqqdqdPPPdddqP")  # the fields of args in attention_shift.c
_kernel = native.loader("eff_attention_shift", _ARGS)


@dataclass(frozen=True)
class Attended:
    """Causal attention that was computed: query i sees S - Sq + i + 1 keys.

    Attributes:
        q: [B, H, Sq, D].
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
    """Whether the compiled code can read queries, keys and values: CPU tensors of one float type, no gradient."""
    return (
        q.is_cpu
        and q.dtype in DTYPE_CODES
        and q.dtype is k.dtype is v.dtype
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and not needs_torch_dispatch((q, k, v))
        and native.unavailable() is None
    )


def scale_weights(attended: Attended, columns: Tensor, beta: float, heads: Sequence[int] | None = None) -> Tensor:
    """The output if some keys had ``beta`` times their weight and the others, in proportion, what these lose.

    Where the others of a query have so little that their share of the rest would lose its digits, the query is computed
    from all keys.

    Args:
        attended: The attention.
        columns: The keys of each head, bool [B, h, S].
        beta: Factor.
        heads: The h query heads; None for all.

    Returns:
        [B, H, Sq, Dv]; other heads, and queries that see none of the keys, are the same numbers.

    Raises:
        ValueError: shapes do not fit, or the compiled code cannot take the tensors.
    """
    batch, total = attended.q.shape[:2]
    which = list(range(total)) if heads is None else list(heads)
    _check(attended, columns, (batch, len(which), attended.k.shape[2]))
    at, count = _listed(columns.reshape(-1, columns.shape[-1]))
    return _run(attended, which, at, count, 1, beta=beta)


def move_weights(
    attended: Attended, receivers: Tensor, givers: Tensor, others: Tensor, asked: Tensor,
    *, share: float, rho: float, least: float, by_sinks: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output if givers had lost a share of their weight to receivers, in the heads that look at a picture.

    A head is changed for a query if the keys of the picture (receivers and ``givers``) have at least ``least`` of its
    weight, and the receivers at least ``rho`` of that.

    Args:
        attended: The attention.
        receivers: Keys of pictures that get weight, in proportion to what they have, bool [B, S].
        givers: Keys of pictures that lose it.
        others: Further keys that lose it.
        asked: Queries that may be changed, bool [B, Sq].
        share: What givers and others lose, 0 to 1.
        rho: See above.
        least: See above.
        by_sinks: Instead, the givers have at most ``rho`` of the picture's weight, plus 1e-6 for each of its keys.

    Returns:
        The output [B, H, Sq, Dv], whose other rows are the same numbers; and the number of queries that were changed
        and the weight that moved, float64 [B, H, 2].

    Raises:
        ValueError: shapes do not fit, or the compiled code cannot take the tensors.
    """
    batch, heads, count = attended.q.shape[:3]
    for mask in (receivers, givers, others):
        _check(attended, mask, (batch, attended.k.shape[2]))
    if asked.shape != (batch, count):
        raise ValueError(f"asked must be {[batch, count]}, got {list(asked.shape)}")
    kinds = receivers.to(torch.uint8) + 2 * givers.to(torch.uint8) + 3 * others.to(torch.uint8)
    at, number = _listed(kinds)
    kind = kinds.gather(1, at).contiguous() if at.shape[1] else kinds[:, :0]
    images = (receivers | givers).sum(1)
    moved = torch.zeros(batch, heads, 2, dtype=torch.float64)
    out = _run(
        attended, list(range(heads)), at, number, 0,
        kind=kind, asked=asked.to(torch.uint8).contiguous(), images=images, moved=moved,
        numbers=(share, rho, least, int(by_sinks)),
    )  # fmt: skip
    return out, moved


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places of what is not 0 in each row, ascending, int64 [rows, most], and how many there are, int64 [rows]."""
    count = (mask != 0).sum(1)
    row, place = mask.nonzero(as_tuple=True)
    at = torch.zeros(mask.shape[0], int(count.max()) if len(count) else 0, dtype=torch.int64)
    at[row, torch.arange(len(row)) - (count.cumsum(0) - count)[row]] = place
    return at, count


def _run(
    attended: Attended, which: list[int], at: Tensor, count: Tensor, apart: int, *, beta: float = 0.0,
    kind: Tensor | None = None, asked: Tensor | None = None, images: Tensor | None = None,
    moved: Tensor | None = None, numbers: tuple[float, float, float, int] = (0.0, 0.0, 0.0, 0),
) -> Tensor:  # fmt: skip
    q, k, v, lse = attended.q, attended.k, attended.v, attended.lse
    out = attended.out.clone()
    if out.stride(3) != 1:
        out = out.contiguous()
    if not at.shape[1]:
        return out
    heads = torch.tensor(which, dtype=torch.int64)
    failed = _kernel()(_ARGS.pack(
        q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3],
        out.data_ptr(), *out.stride()[:3], lse.data_ptr(), *lse.stride(),
        DTYPE_CODES[q.dtype], *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
        heads.data_ptr(), len(which), at.data_ptr(), count.data_ptr(), at.shape[1], apart,
        attended.scale, torch.get_num_threads(), beta, *map(_pointer, (kind, asked, images)), *numbers, _pointer(moved),
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"attention_shift could not allocate scratch memory for q {list(q.shape)}")
    return out


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _check(attended: Attended, mask: Tensor, shape: tuple[int, ...]) -> None:
    q, k, v, out, lse = attended.q, attended.k, attended.v, attended.out, attended.lse
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"columns must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    fits = out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == q.shape[:3] and out.dtype is q.dtype
    if not fits or k.shape[:3] != v.shape[:3] or q.shape[2] > k.shape[2] or lse.dtype is not torch.float32:
        raise ValueError(
            f"q, k, v, out and lse do not fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {list(out.shape)}, "
            f"{list(lse.shape)}"
        )
    if not can_shift(q, k, v):
        raise ValueError(f"the compiled code cannot take {q.dtype} [..., {q.shape[3]}] on {q.device}; see can_shift")

"""Changed weights in compiled code: with the log-sum-exp of each query only the changed keys are looked at."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from eff_kernels import native
from eff_kernels.native import DTYPE_CODES
from eff_kernels.ops.attention_shift.args import MoveArgs, ScaleArgs
from eff_kernels.ops.attention_shift.common import copied

_ARGS = struct.Struct("PqqqPqqqPqqqPqqqPqqqqqqqqqqqPqPPqqdqdPPPdddqP")  # the fields of args in attention_shift.c
_kernel = native.loader("eff_attention_shift", _ARGS)


def reject(q: Tensor, *_: object) -> str | None:
    """Why the compiled code cannot run this call."""
    return native.unfit(q)


def scale_weights(*args: *ScaleArgs) -> Tensor:
    """As the reference. Where the share of the rest would lose its digits, a query is computed from all keys."""
    q, k, v, out, lse, scale, columns, beta, heads = args
    at, count = _listed(columns.reshape(-1, columns.shape[-1]))
    found = copied(out)
    _run(q, k, v, found, lse, scale, heads, at, count, 1, beta, (0, 0, 0), (0.0, 0.0, 0.0, 0), 0)
    return found


def move_weights(*args: *MoveArgs) -> tuple[Tensor, Tensor]:
    """As the reference."""
    q, k, v, out, lse, scale, receivers, givers, others, asked, share, rho, least, by_sinks = args
    kinds = receivers.to(torch.uint8) + 2 * givers.to(torch.uint8) + 3 * others.to(torch.uint8)
    at, count = _listed(kinds)
    kind = kinds.gather(1, at).contiguous() if at.shape[1] else kinds[:, :0]
    images, queries = (receivers | givers).sum(1), asked.to(torch.uint8).contiguous()
    moved = torch.zeros(*q.shape[:2], 2, dtype=torch.float64)
    found = copied(out)
    _run(
        q, k, v, found, lse, scale, range(q.shape[1]), at, count, 0, 0.0,
        (kind.data_ptr(), queries.data_ptr(), images.data_ptr()), (share, rho, least, int(by_sinks)), moved.data_ptr(),
    )  # fmt: skip
    return found, moved


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Places of what is not 0 in each row, ascending, int64 [rows, most], and how many there are, int64 [rows]."""
    count = (mask != 0).sum(1)
    row, place = mask.nonzero(as_tuple=True)
    at = torch.zeros(mask.shape[0], int(count.max()) if len(count) else 0, dtype=torch.int64)
    at[row, torch.arange(len(row)) - (count.cumsum(0) - count)[row]] = place
    return at, count


def _run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, heads: Sequence[int], at: Tensor,
    count: Tensor, apart: int, beta: float, masks: tuple[int, int, int], numbers: tuple[float, float, float, int],
    moved: int,
) -> None:  # fmt: skip
    if not at.shape[1]:
        return
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    which = torch.tensor(list(heads), dtype=torch.int64)
    failed = _kernel()(_ARGS.pack(
        q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3],
        out.data_ptr(), *out.stride()[:3], lse.data_ptr(), *lse.stride(),
        DTYPE_CODES[q.dtype], *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3],
        which.data_ptr(), len(which), at.data_ptr(), count.data_ptr(), at.shape[1], apart,
        scale, torch.get_num_threads(), beta, *masks, *numbers, moved,
    ))  # fmt: skip
    if failed:
        raise MemoryError(f"attention_shift could not allocate scratch memory for q {list(q.shape)}")

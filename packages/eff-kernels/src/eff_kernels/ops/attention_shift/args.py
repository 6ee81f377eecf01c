"""Arguments, each list once: for the schema, the checks and all backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from eff_kernels.ops.common import check_groups


class ScaleArgs(NamedTuple):
    """Of `scale_weights`; the first six are those of `Attended`."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    columns: Tensor
    beta: float
    heads: Sequence[int]


class MoveArgs(NamedTuple):
    """Of `move_weights`; the first six are those of `Attended`."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    receivers: Tensor
    givers: Tensor
    others: Tensor
    asked: Tensor
    share: float
    rho: float
    least: float
    by_sinks: bool


def check_scale(*args: *ScaleArgs) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    q, k, v, out, lse, _, columns, _, heads = args
    _check_attended(q, k, v, out, lse)
    if any(not 0 <= h < q.shape[1] for h in heads):
        raise ValueError(f"heads must be in 0..{q.shape[1] - 1}, got {list(heads)}")
    _check_mask("columns", columns, (q.shape[0], len(heads), k.shape[2]))


def check_move(*args: *MoveArgs) -> None:
    """Raise ValueError or TypeError unless the arguments fit."""
    q, k, v, out, lse, _, receivers, givers, others, asked, *_ = args
    _check_attended(q, k, v, out, lse)
    for name, mask in (("receivers", receivers), ("givers", givers), ("others", others)):
        _check_mask(name, mask, (q.shape[0], k.shape[2]))
    _check_mask("asked", asked, (q.shape[0], q.shape[2]))


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")


def _check_attended(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    fits = fits and q.shape[0] == k.shape[0] and q.shape[2] <= k.shape[2]
    if not fits or out.shape != (*q.shape[:3], v.shape[3]) or lse.shape != q.shape[:3]:
        raise ValueError(
            f"q, k, v, out and lse do not fit: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}, {list(out.shape)}, "
            f"{list(lse.shape)}"
        )
    check_groups(q.shape[1], k.shape[1])
    if not q.dtype is k.dtype is v.dtype is out.dtype or not q.is_floating_point():
        raise TypeError(
            f"q, k, v and out must have one float dtype, got {q.dtype}, {k.dtype}, {v.dtype} and {out.dtype}"
        )
    if lse.dtype is not torch.float32:
        raise TypeError(f"lse must be float32, got {lse.dtype}")

"""The two losses of HASTE as pure functions: cosine of features, cross-entropy of attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eff_guidance.alignment.resize import Grid, grid_of, resize_attention, resize_tokens

CHUNK = 2**22
"""Entries of logits that are in memory at a time: 16 MiB in float32 each for student and teacher."""


def feature_alignment_loss(
    h: Tensor,
    y: Tensor,
    *,
    interpolate: bool = False,
    student_grid: Grid | None = None,
    teacher_grid: Grid | None = None,
) -> Tensor:
    """Minus the mean cosine of projected hidden states and a teacher's features, in -1 .. 1 (HASTE section 3, REPA).

    Args:
        h: The student's tokens after the projector, [B, N, C].
        y: The teacher's, [B, N, C].
        interpolate: Whether to bring the one on the larger grid to the smaller grid where they differ.
        student_grid: Rows and columns of the student's tokens; by default a square.
        teacher_grid: The same of the teacher's.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ValueError: shapes do not fit.
    """
    if h.dim() != 3 or y.dim() != 3 or h.shape[0] != y.shape[0] or h.shape[2] != y.shape[2]:
        raise ValueError(f"student {list(h.shape)} and teacher {list(y.shape)}; both must be [B, N, C] of one B and C")
    grids = common_grids(h.shape[1], y.shape[1], interpolate, student_grid, teacher_grid)
    h, y = _precise(h), _precise(y.detach())
    if grids is not None:
        old_h, old_y, new = grids
        h, y = resize_tokens(h, old_h, new), resize_tokens(y, old_y, new)
    return -F.cosine_similarity(h, y.to(h.dtype), dim=-1).mean()


def attention_alignment_loss(
    q_s: Tensor,
    k_s: Tensor,
    q_t: Tensor,
    k_t: Tensor,
    *,
    heads: int | None = None,
    scale_s: float | None = None,
    scale_t: float | None = None,
    interpolate: bool = False,
    student_grid: Grid | None = None,
    teacher_grid: Grid | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Cross-entropy of a student's attention against a teacher's, mean over samples, heads and queries (HASTE).

    ``-sum_j softmax(Z_t)_j log softmax(Z_s)_j`` with ``Z = scale q k'``, computed as ``lse(Z_s) - sum_j P_j Z_s_j`` in
    float32 block by block, in the backward pass once more: no map is kept. Its least value is the entropy of the
    teacher's attention. Only the student's queries and keys get gradients.

    Args:
        q_s: The student's queries as its attention multiplies them, [B, H, N, d].
        k_s: Its keys, [B, KV, N, d]: query head h looks at key head h // (H / KV).
        q_t: The teacher's queries, [B, Ht, Nt, dt], without class and register tokens.
        k_t: Its keys, [B, KVt, Nt, dt].
        heads: How many heads, the first ones, are aligned one to one; by default all of the student's.
        scale_s: Factor of the student's logits, by default ``d ** -0.5``.
        scale_t: The same of the teacher's.
        interpolate: Whether maps on grids of different sizes are brought to the smaller one: the teacher's weights
            bilinearly, with rows scaled to sum to 1; the student's logits bilinearly.
        student_grid: Rows and columns of the student's tokens; by default a square.
        teacher_grid: The same of the teacher's.
        chunk: Most logits of one model in memory at a time.

    Returns:
        A scalar in float32 (float64 for float64).

    Raises:
        ValueError: shapes, heads or numbers of tokens do not fit.
    """
    for name, x in (("q_s", q_s), ("k_s", k_s), ("q_t", q_t), ("k_t", k_t)):
        if x.dim() != 4 or x.shape[0] != q_s.shape[0]:
            raise ValueError(f"{name} has shape {list(x.shape)}; wanted [{q_s.shape[0]}, heads, tokens, dim]")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; use 1 or more")
    count = q_s.shape[1] if heads is None else heads
    for whose, q, k in (("student", q_s, k_s), ("teacher", q_t, k_t)):
        if q.shape[2:] != k.shape[2:] or q.shape[1] % k.shape[1]:
            raise ValueError(f"the {whose}'s queries {list(q.shape)} do not fit its keys {list(k.shape)}")
        if not 1 <= count <= q.shape[1]:
            raise ValueError(f"heads={count}; the {whose} has {q.shape[1]} heads")
    grids = common_grids(q_s.shape[2], q_t.shape[2], interpolate, student_grid, teacher_grid)
    scale_s = q_s.shape[-1] ** -0.5 if scale_s is None else scale_s
    scale_t = q_t.shape[-1] ** -0.5 if scale_t is None else scale_t
    q, k = (_flat(_precise(x), q_s.shape[1], count) for x in (q_s, k_s))
    qt, kt = (_flat(_precise(x.detach()), q_t.shape[1], count).to(q.dtype) for x in (q_t, k_t))
    teacher: tuple[Grid, Grid] | None = None
    if grids is not None:
        old_s, old_t, new = grids
        # Logits are bilinear in queries and keys: interpolating these is interpolating those.
        q, k = resize_tokens(q, old_s, new), resize_tokens(k, old_s, new)
        teacher = (old_t, new) if old_t != new else None
    return _CrossEntropy.apply(q, k, qt, kt, scale_s, scale_t, teacher, chunk)


def common_grids(
    student: int, teacher: int, interpolate: bool, student_grid: Grid | None, teacher_grid: Grid | None
) -> tuple[Grid, Grid, Grid] | None:
    """Grids of student, teacher and of both together, or None where token i belongs to token i.

    Raises:
        ValueError: the numbers of tokens differ without ``interpolate``, or a grid does not fit.
    """
    if not interpolate:
        if student != teacher:
            raise ValueError(
                f"the student has {student} tokens, the teacher {teacher}; interpolate=True brings them together"
            )
        return None
    ours, theirs = grid_of(student, student_grid, "student"), grid_of(teacher, teacher_grid, "teacher")
    return ours, theirs, ours if student <= teacher else theirs


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _flat(x: Tensor, heads: int, count: int) -> Tensor:
    """The first heads of [B, KV, N, d] as [B count, N, d], one for each query head."""
    group = heads // x.shape[1]
    chosen = x[:, :count] if group == 1 else x[:, [h // group for h in range(count)]]
    return chosen.flatten(0, 1)


class _CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of maps [M, N, N] given by queries and keys [M, N, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, qt: Tensor, kt: Tensor, scale: float, scale_t: float, resize: Any, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(q, k, qt, kt)
        ctx.rest = scale, scale_t, resize, chunk
        with torch.autocast(q.device.type, enabled=False):
            sums = [
                (z.logsumexp(-1) - (p * z).sum(-1)).sum()
                for _, _, z, p in _blocks(q, k, qt, kt, scale, scale_t, resize, chunk)
            ]
        return torch.stack(sums).sum() / (q.shape[0] * q.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, qt, kt = ctx.saved_tensors
        scale = ctx.rest[0]
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        factor = grad * scale / (q.shape[0] * q.shape[1])
        with torch.autocast(q.device.type, enabled=False):
            for maps, rows, z, p in _blocks(q, k, qt, kt, *ctx.rest):
                dz = (z.softmax(-1) - p) * factor
                dq[maps, rows] = dz @ k[maps]
                dk[maps] += dz.mT @ q[maps, rows]
        return dq, dk, None, None, None, None, None, None


def _blocks(
    q: Tensor, k: Tensor, qt: Tensor, kt: Tensor, scale: float, scale_t: float, resize: Any, chunk: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Maps and rows of a block, its logits of the student and weights of the teacher, [m, n, N]."""
    size = max(k.shape[1], kt.shape[1])
    for maps, rows in _cuts(q.shape[0], q.shape[1], size, chunk, whole=resize is not None):
        z = q[maps, rows] @ k[maps].mT * scale
        theirs = qt[maps] if resize is not None else qt[maps, rows]
        p = (theirs @ kt[maps].mT * scale_t).softmax(-1)
        yield maps, rows, z, p if resize is None else resize_attention(p, *resize)


def _cuts(maps: int, rows: int, keys: int, chunk: int, *, whole: bool) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most ``chunk`` entries; ``whole`` keeps the rows of a map together."""
    each = max(1, chunk // (keys * (keys if whole else rows)))
    step = rows if whole or each > 1 else max(1, min(rows, chunk // keys))
    for start in range(0, maps, each):
        for row in range(0, rows, step):
            yield slice(start, start + each), slice(row, row + step)

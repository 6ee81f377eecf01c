"""Losses that push representations of different pictures apart, inside the batch and from a bank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 8192
"""Rows of a bank that are compared at a time."""


def dispersive_loss(
    z: Tensor, temperature: float = 0.5, *, metric: Literal["l2", "cosine"] = "l2", include_self: bool = True
) -> Tensor:
    """Dispersive loss (2506.09027): ``log mean_ij exp(-D_ij / temperature)`` over the pairs of a batch.

    Args:
        z: Representations, [B, ...]; all but the first dimension count as entries.
        temperature: Divides the distances.
        metric: "l2": D is the squared distance divided by the number of entries; "cosine": D is 1 - cosine.
        include_self: Whether pairs of a picture with itself count, as in the published code; then the loss is between
            -log B and 0.

    Returns:
        A scalar in float32 (float64 for float64); 0 where there is no pair.

    Raises:
        ValueError: the shape, the temperature or the metric is no possible one.
    """
    if z.dim() < 2 or not z.shape[0]:
        raise ValueError(f"z has shape {list(z.shape)}; wanted [B, ...] with B of 1 or more")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; use a positive number")
    if metric not in ("l2", "cosine"):
        raise ValueError(f"metric={metric!r}; use 'l2' or 'cosine'")
    rows = _precise(z).flatten(1)
    itself = torch.eye(rows.shape[0], dtype=torch.bool, device=z.device)
    with torch.autocast(z.device.type, enabled=False):
        if metric == "l2":
            rows = rows - rows.mean(0)  # distances stay, and their cancellation gets small
            squares = rows.square().sum(1)
            distance = (squares[:, None] + squares - 2 * rows @ rows.T).clamp(min=0) / rows.shape[1]
        else:
            unit = F.normalize(rows, dim=1)
            distance = 1 - unit @ unit.T
        scores = (-distance / temperature).masked_fill(itself, 0.0)
        if not include_self:
            if rows.shape[0] == 1:
                return 0.0 * rows.sum()
            scores = scores.masked_fill(itself, -torch.inf)
        pairs = rows.shape[0] ** 2 if include_self else rows.shape[0] * (rows.shape[0] - 1)
        return scores.flatten().logsumexp(0) - math.log(pairs)


def bank_repulsion_loss(
    z: Tensor,
    bank: Tensor | None = None,
    *,
    temperature: float = 0.5,
    ids: Tensor | None = None,
    bank_ids: Tensor | None = None,
    valid: Tensor | None = None,
    take_part: Tensor | None = None,
    in_batch: bool = True,
    include_self: bool = False,
    reduction: Literal["log_mean", "mean_log"] = "log_mean",
    chunk: int = CHUNK,
) -> Tensor:
    """Repulsor's loss (2512.08648): ``log mean exp(z_i . k_j / temperature)`` over pairs of different pictures.

    Keys k are the rows of the bank, without gradient, and the other rows of z, with gradients on both sides. Pairs of
    equal ids are left out. Rows of the bank are compared ``chunk`` at a time, in float32, and once more for the
    gradient; the score matrix is never whole.

    Args:
        z: Representations, [B, d]; unit vectors for the meaning that the paper gives them.
        bank: Earlier ones, [K, d], any floating point type; None: there is none.
        temperature: Divides the products.
        ids: Of the pictures of z, int64 [B].
        bank_ids: Of those in the bank, int64 [K].
        valid: Which rows of the bank count, bool [K]; None: all.
        take_part: Which rows of z count, as queries and as keys, bool [B]; None: all.
        in_batch: Whether the rows of z are keys too.
        include_self: Whether a row of z is its own key as well.
        reduction: "log_mean": the logarithm of the mean over all pairs; "mean_log": of each picture's own mean, then
            the mean over the pictures that take part; one without any key adds 0 to it.
        chunk: Rows of the bank at a time.

    Returns:
        A scalar in float32 (float64 for float64), 0 where there is no pair.

    Raises:
        ValueError: shapes do not fit, ids are there for one side only, or a setting is out of range.
    """
    _check(z, bank, temperature, ids, bank_ids, valid, take_part, chunk)
    if reduction not in ("log_mean", "mean_log"):
        raise ValueError(f"reduction={reduction!r}; use 'log_mean' or 'mean_log'")
    query = _precise(z)
    ones = torch.ones(z.shape[0], dtype=torch.bool, device=z.device)
    part = ones if take_part is None else take_part
    parts: list[Rows] = []
    if in_batch:
        parts.append(_in_batch(query, temperature, ids, part, include_self))
    if bank is not None and bank.shape[0]:
        known = None if ids is None or bank_ids is None else (ids, bank_ids)
        parts.append(Rows(*_BankRows.apply(query, bank.detach(), known, valid, temperature, chunk)))
    if not parts:
        return 0.0 * query.sum()
    count = torch.stack([rows.num_keys for rows in parts]).sum(0) * part
    empty = count == 0
    # Rows without a key would make NaN of their gradient; they are put to 0 and left out below.
    lse = torch.stack([rows.lse for rows in parts]).masked_fill(empty, 0.0).logsumexp(0)
    if reduction == "mean_log":
        each = (lse - count.clamp(min=1).to(lse.dtype).log()).masked_fill(empty, 0.0)
        return each.sum() / part.sum().clamp(min=1)
    nothing = empty.all()
    whole = lse.masked_fill(empty & ~nothing, -torch.inf).logsumexp(0) - count.sum().clamp(min=1).to(lse.dtype).log()
    return whole.masked_fill(nothing, 0.0)


class Rows(NamedTuple):
    """Log-sum-exp [B] of the scores of each row, -inf where it has no key, and the number of its keys, int64 [B]."""

    lse: Tensor
    num_keys: Tensor


def _in_batch(query: Tensor, temperature: float, ids: Tensor | None, part: Tensor, include_self: bool) -> Rows:
    itself = torch.eye(query.shape[0], dtype=torch.bool, device=query.device)
    same = itself if ids is None else ids[:, None] == ids
    keep = part & (~same | (itself & include_self))
    with torch.autocast(query.device.type, enabled=False):
        scores = (query @ query.T / temperature).masked_fill(~keep, -torch.inf)
    empty = ~keep.any(1)
    lse = scores.masked_fill(empty[:, None], 0.0).logsumexp(1).masked_fill(empty, -torch.inf)
    return Rows(lse, keep.sum(1))


class _BankRows(torch.autograd.Function):
    """`Rows` of queries against a bank, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, bank: Tensor, ids: Any, valid: Tensor | None, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        lse = query.new_full((query.shape[0],), -torch.inf)
        count = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        for _, scores, keep in _chunks(query, bank, ids, valid, temperature, chunk):
            lse = torch.logaddexp(lse, scores.logsumexp(1))
            count += keep.sum(1)
        ctx.save_for_backward(query, bank, lse, valid, *(ids or ()))
        ctx.rest = temperature, chunk
        ctx.mark_non_differentiable(count)
        return lse, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        query, bank, lse, valid, *ids = ctx.saved_tensors
        temperature, chunk = ctx.rest
        out = torch.zeros_like(query)
        safe = lse.masked_fill(lse == -torch.inf, 0.0)[:, None]
        for keys, scores, _keep in _chunks(query, bank, ids or None, valid, temperature, chunk):
            out += (scores - safe).exp() @ keys
        return out * (grad / temperature)[:, None], None, None, None, None, None


def _chunks(
    query: Tensor, bank: Tensor, ids: Any, valid: Tensor | None, temperature: float, chunk: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Keys [c, d], their scores [B, c] with -inf where masked, and what is not, bool [B, c]."""
    for start in range(0, bank.shape[0], chunk):
        at = slice(start, start + chunk)
        keys = bank[at].to(query.dtype)
        keep = torch.ones(query.shape[0], keys.shape[0], dtype=torch.bool, device=query.device)
        if valid is not None:
            keep = keep & valid[at]
        if ids is not None:
            keep = keep & (ids[0][:, None] != ids[1][at])
        with torch.autocast(query.device.type, enabled=False):
            scores = query @ keys.T / temperature
        yield keys, scores.masked_fill(~keep, -torch.inf), keep


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check(
    z: Tensor, bank: Tensor | None, temperature: float, ids: Any, bank_ids: Any, valid: Any, take_part: Any, chunk: int
) -> None:
    if z.dim() != 2 or not z.shape[0]:
        raise ValueError(f"z has shape {list(z.shape)}; wanted [B, d] with B of 1 or more")
    if bank is not None and (bank.dim() != 2 or bank.shape[1] != z.shape[1]):
        raise ValueError(f"the bank has shape {list(bank.shape)}; wanted [K, {z.shape[1]}]")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; use a positive number")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; use 1 or more")
    if bank is not None and bank.shape[0] and (ids is None) != (bank_ids is None):
        raise ValueError("ids and bank_ids belong together; give both or neither")
    rows = 0 if bank is None else bank.shape[0]
    own = [("ids", ids, z.shape[0]), ("take_part", take_part, z.shape[0])]
    for name, x, length in [*own, ("bank_ids", bank_ids, rows), ("valid", valid, rows)]:
        if x is not None and x.shape != (length,):
            raise ValueError(f"{name} has shape {list(x.shape)}; wanted [{length}]")

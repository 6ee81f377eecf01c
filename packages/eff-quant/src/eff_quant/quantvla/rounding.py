"""Rounding weights to 4 or 8 bits with one scale for each row, chosen among candidates by the error that it makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CANDIDATES = (0.5, 0.75, 1.0, 1.25, 1.5)


class RoundedRows(NamedTuple):
    """``codes`` int8 [N, K] and ``scale`` float32 [N]: row n stands for codes[n] * scale[n]."""

    codes: Tensor
    scale: Tensor


def check_finite(weight: Tensor) -> None:
    """Check the weights [N, K] of a layer.

    Raises:
        ValueError: a row holds inf or NaN; the message names it.
    """
    finite = weight.isfinite().all(1)
    if not finite.all():
        row = int(torch.nonzero(~finite)[0])
        raise ValueError(f"weight row {row} holds inf or NaN; quantisation needs finite weights")


def round_rows(weight: Tensor, bits: int, candidates: Sequence[float] = CANDIDATES) -> RoundedRows:
    """Quantise each row of ``weight`` [N, K] symmetrically to codes from -2^(bits-1) to 2^(bits-1) - 1.

    scale = rowmax / (2^(bits-1) - 1) / a, with the a of ``candidates`` that has the least squared error in this row
    (the first of equals). A row of zeros gets scale 0.

    Raises:
        ValueError: a row holds inf or NaN; the message names it.
    """
    weight = weight.detach().float()
    top = 2 ** (bits - 1) - 1
    absmax = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(len(weight))
    check_finite(absmax[:, None])
    best = RoundedRows(torch.zeros_like(weight, dtype=torch.int8), torch.zeros_like(absmax))
    least = torch.full_like(absmax, torch.inf, dtype=torch.float64)
    for a in candidates:
        scale = absmax / top / a
        codes = (weight / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-top - 1, top)
        error = (codes * scale[:, None] - weight).double().square().sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best.codes[better] = codes[better].to(torch.int8)
        best.scale[better] = scale[better]
    return best

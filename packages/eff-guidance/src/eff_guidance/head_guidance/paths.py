"""Ways from an attention map to the identity other than the straight line; they need the map, in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from eff_kernels.edit.attention import Part
from torch import Tensor

_FLAT = 1e-4  # angle below which the arc is taken for a line
_SMOOTH, _LEAST = 1e-6, 1e-12


def slerp(weights: Tensor, rows: Tensor, strength: Tensor) -> Tensor:
    """The Fisher-Rao arc from each row to its one-hot row, at ``strength`` of its length.

    Square roots of distributions lie on a sphere; with theta = acos(sqrt(a_ii)) the point is
    (sin(u theta) e_i + sin((1 - u) theta) sqrt(a)) / sin(theta), squared and normalised.

    Args:
        weights: Rows of the map [B, h, r, N].
        rows: Which rows of the map they are, int64 [r].
        strength: u of each head [h].
    """
    u = strength[:, None, None]
    own = _own(weights, rows)
    theta = own.clamp(0, 1).sqrt().acos()
    flat = theta < _FLAT
    safe = theta.masked_fill(flat, 1.0)
    arc = ((1 - u) * safe).sin() / safe.sin() * weights.sqrt()
    arc = _add_own(arc, rows, (u * safe).sin() / safe.sin()).square()
    line = _add_own((1 - u) * weights, rows, u.expand_as(own))
    return torch.where(flat, line, arc / arc.sum(-1, keepdim=True))


def log_linear(weights: Tensor, rows: Tensor, strength: Tensor) -> Tensor:
    """The geometric mean p^u a^(1-u) of each row and its one-hot row, which is smoothed by 1e-6; normalised.

    Args:
        weights: Rows of the map [B, h, r, N].
        rows: Which rows of the map they are, int64 [r].
        strength: u of each head [h].
    """
    u = strength[:, None, None]
    logs = (1 - u) * weights.clamp(min=_LEAST).log() + u * math.log(_SMOOTH)
    # The normalisation takes care of all factors but this ratio of the diagonal to the rest.
    ratio = math.log((1 + _SMOOTH) / _SMOOTH)
    return _add_own(logs, rows, (u * ratio).expand_as(_own(weights, rows))).softmax(-1)


PATHS = {"slerp": slerp, "log_linear": log_linear}


def edit_of(path: str, strength: Tensor, first: int = 0) -> Callable[[Tensor, Part], Tensor]:
    """The edit of weights that `eff_kernels.edit.attention` asks for; samples before ``first`` stay as they are."""

    def edit(weights: Tensor, part: Part) -> Tensor:
        damaged = PATHS[path](weights[first:], part.rows, strength.to(weights))
        return torch.cat([weights[:first], damaged]) if first else damaged

    return edit


def _own(weights: Tensor, rows: Tensor) -> Tensor:
    """Weight of each row's own key, [B, h, r, 1]."""
    at = rows[None, None, :, None].expand(*weights.shape[:3], 1)
    return weights.gather(-1, at)


def _add_own(weights: Tensor, rows: Tensor, more: Tensor) -> Tensor:
    at = rows[None, None, :, None].expand(*weights.shape[:3], 1)
    return weights.scatter_add(-1, at, more.to(weights.dtype).expand(*weights.shape[:3], 1))

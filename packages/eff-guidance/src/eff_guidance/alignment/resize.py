"""Bringing tokens on one grid to another: features, and maps of attention."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]


def grid_of(tokens: int, grid: Grid | None, whose: str) -> Grid:
    """The grid on which tokens lie: the given one, else a square.

    Raises:
        ValueError: the grid has another number of places, or there is none and the tokens make no square.
    """
    if grid is not None:
        if grid[0] * grid[1] != tokens:
            raise ValueError(f"{whose} grid {grid} has {grid[0] * grid[1]} places, but there are {tokens} tokens")
        return grid
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"{tokens} tokens of the {whose} do not form a square; give their grid as {whose}_grid")
    return side, side


def resize_matrix(old: Grid, new: Grid) -> Tensor:
    """Weights R float32 [new places, old places] of bilinear interpolation: ``R @ tokens``; its rows sum to 1."""
    return _matrix(tuple(old), tuple(new))


@functools.lru_cache(maxsize=16)
def _matrix(old: Grid, new: Grid) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        one_each = torch.eye(old[0] * old[1], dtype=torch.float64).view(-1, 1, *old)
        return F.interpolate(one_each, new, mode="bilinear", align_corners=False).flatten(1).T.float().contiguous()


def resize_tokens(tokens: Tensor, old: Grid, new: Grid) -> Tensor:
    """Tokens [..., N, D] on grid ``old`` brought to grid ``new``, bilinearly, [..., N', D]."""
    if old == new:
        return tokens
    with torch.autocast(tokens.device.type, enabled=False):
        return resize_matrix(old, new).to(tokens.device, tokens.dtype) @ tokens


def resize_attention(weights: Tensor, old: Grid, new: Grid) -> Tensor:
    """Maps of attention [..., N, N] brought to another grid (HASTE, appendix A.3), [..., N', N'].

    Bilinear over keys, then over queries; then each row is scaled to sum to 1.
    """
    if old == new:
        return weights
    matrix = resize_matrix(old, new).to(weights.device, weights.dtype)
    with torch.autocast(weights.device.type, enabled=False):
        found = matrix @ (weights @ matrix.T)
    return found / found.sum(-1, keepdim=True)

"""Order of the tokens of a picture or video: neighbours in space become neighbours in the sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def tile_order(shape: Sequence[int], tile: Sequence[int], *, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Permutation that walks over a map tile by tile, and its inverse.

    Pooling a block of tokens to one mean takes them for alike. In row-major order 64 tokens of a picture are a stripe;
    in tiles of 8 x 8 they are a patch. Use ``x[:, order]`` before the blocks of a model and ``y[:, inverse]`` after
    them, with position embeddings ordered likewise; attention without a mask does not mind the order.

    Args:
        shape: Lengths of the axes, such as (height, width) or (frames, height, width).
        tile: Lengths of a tile; the last tiles of an axis may be cut.
        prefix: Tokens in front of the map (class, registers, text), which stay where they are.

    Returns:
        Two int64 tensors [prefix + number of tokens].

    Raises:
        ValueError: ``tile`` has another number of axes, or a length below 1.
    """
    if len(shape) != len(tile) or any(n < 1 for n in (*shape, *tile)):
        raise ValueError(f"shape {tuple(shape)} and tile {tuple(tile)} need the same axes, each at least 1")
    key = torch.zeros(tuple(shape), dtype=torch.int64)
    for axis, (length, size) in enumerate(zip(shape, tile, strict=True)):
        place = torch.arange(length).view(-1, *[1] * (len(shape) - axis - 1))
        key = key * math.ceil(length / size) + place // size
    for axis, (length, size) in enumerate(zip(shape, tile, strict=True)):
        place = torch.arange(length).view(-1, *[1] * (len(shape) - axis - 1))
        key = key * size + place % size
    inner = key.flatten().argsort(stable=True) + prefix
    order = torch.cat([torch.arange(prefix), inner])
    return order, order.argsort()

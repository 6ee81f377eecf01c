"""Windows of neighborhood attention: which keys a query sees.

They follow Hassani et al. (arXiv 2403.04690), with dilation (2209.15001) and strides (2504.16922).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def window_bounds(
    length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """First and last key of each query's window on one axis.

    The axis falls into ``dilation`` interleaved sequences, and a query sees keys of its own alone: every
    ``dilation``-th key from the first to the last. At the ends a window is moved inwards, never cut. The ``stride``
    neighbouring queries of a stride group share the window of their leader. A causal window ends at the query itself,
    and is cut where there are too few keys before it.

    Args:
        length: Number of positions on the axis.
        window: Number of keys that a query sees.
        stride: Size of a stride group.
        dilation: Distance between the keys of a window.
        causal: Whether keys after the query are out of sight.

    Returns:
        Two int64 tensors [length]: indices of the first and of the last key.
    """
    index = torch.arange(length)
    residue, place = index % dilation, index // dilation
    count = (length - residue + dilation - 1) // dilation  # positions in the query's own sequence
    group = place // stride * stride
    if causal:
        leader = torch.minimum(group + stride - 1, count - 1)
        first, last = (leader - window + 1).clamp(min=0), place
    else:
        leader = torch.minimum(group + stride // 2, count - 1)
        first = torch.minimum((leader - window // 2).clamp(min=0), count - window)
        last = first + window - 1
    return first * dilation + residue, last * dilation + residue


def neighborhood_mask(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[bool],
) -> Tensor:
    """Which key each query sees, bool [N, N] over the N tokens of a map in row-major order.

    A key is seen if it lies in the window on every axis, so that the mask is the Kronecker product of one mask an axis.

    Args:
        shape: Lengths of the axes.
        kernel_size: Keys in the window, on each axis; see `window_bounds` for this and the others.
        stride: Size of a stride group, on each axis.
        dilation: Distance between keys, on each axis.
        is_causal: Whether keys after the query are out of sight, on each axis.
    """
    mask = torch.ones(1, 1, dtype=torch.bool)
    for length, window, step, spacing, causal in zip(shape, kernel_size, stride, dilation, is_causal, strict=True):
        first, last = (bound[:, None] for bound in window_bounds(length, window, step, spacing, causal))
        key = torch.arange(length)
        seen = (key >= first) & (key <= last) & ((key - first) % spacing == 0)
        mask = torch.kron(mask, seen)
    return mask


@functools.lru_cache(maxsize=16)
def window_index(
    shape: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> tuple[Tensor, Tensor]:
    """Flat index of each key of each window, int64 [slots, N], and whether the slot holds a key, bool [slots, N].

    A slot without a key has the index of the query itself.
    """
    index, there = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    for length, window, step, spacing, causal in zip(shape, kernel_size, stride, dilation, is_causal, strict=True):
        first, last = window_bounds(length, window, step, spacing, causal)
        key = first + spacing * torch.arange(window)[:, None]
        inside = key <= last
        key = torch.where(inside, key, torch.arange(length))
        index = (index[:, None, :, None] * length + key[None, :, None, :]).flatten(2).flatten(0, 1)
        there = (there[:, None, :, None] & inside[None, :, None, :]).flatten(2).flatten(0, 1)
    return index, there

"""Which pixels train and which test, with a measure of how much the two share.

Patches of neighbouring pixels overlap: a random split lets a model see its test pixels in training. Blocks with a guard
between them do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class HsiSplit:
    """Masks [H, W] of labelled pixels; no pixel is in two."""

    train: Mask
    val: Mask
    test: Mask

    def __post_init__(self) -> None:
        if (self.train & self.val).any() or (self.train & self.test).any() or (self.val & self.test).any():
            raise ValueError("the masks of a split overlap")


def hsi_split(
    labels: NDArray[np.int64],
    *,
    mode: Literal["random", "block", "per_class"] = "block",
    train: float = 0.1,
    val: float = 0.0,
    per_class: int = 15,
    block: int = 29,
    guard: int = 7,
    seed: int = 0,
) -> HsiSplit:
    """Split the labelled pixels.

    Args:
        labels: [H, W], 0 is unlabelled.
        mode: "random" draws a share of each class (at least 3 pixels), "per_class" a number of each class, "block"
            whole blocks of the scene, and leaves out test pixels within ``guard`` of a training or validation pixel.
        train: Share that trains; of the blocks in block mode.
        val: Share that validates.
        per_class: Training pixels of each class in that mode.
        block: Side of a block in pixels.
        guard: Half the patch, in pixels.
        seed: Of the draw.

    Raises:
        ValueError: shares out of range, or a class without a training pixel (they are listed).
    """
    if not (0 < train < 1 and 0 <= val < 1 and train + val < 1):
        raise ValueError(f"shares must be in (0, 1) and leave something to test, got train={train}, val={val}")
    rng = np.random.default_rng(seed)
    if mode == "block":
        masks = _blocks(labels, train, val, block, rng)
    elif mode in ("random", "per_class"):
        masks = _pixels(labels, train, val, per_class if mode == "per_class" else None, rng)
    else:
        raise ValueError(f"mode={mode!r}; use 'random', 'block' or 'per_class'")
    classes = np.unique(labels[labels > 0])
    if missing := sorted(set(classes.tolist()) - set(np.unique(labels[masks[0]]).tolist())):
        raise ValueError(f"classes {missing} have no training pixel; take another seed, more blocks or a larger share")
    test = (labels > 0) & ~masks[0] & ~masks[1]
    if mode == "block":
        test &= ~grow(masks[0] | masks[1], guard)
    return HsiSplit(masks[0], masks[1], test)


def _pixels(
    labels: NDArray[np.int64], train: float, val: float, count: int | None, rng: np.random.Generator
) -> tuple[Mask, Mask]:
    masks = np.zeros(labels.shape, bool), np.zeros(labels.shape, bool)
    for c in np.unique(labels[labels > 0]):
        places = rng.permutation(np.flatnonzero(labels == c))
        first = count if count is not None else max(3, round(train * len(places)))
        second = round(val * len(places))
        masks[0].flat[places[:first]] = True
        masks[1].flat[places[first : first + second]] = True
    return masks


def _blocks(
    labels: NDArray[np.int64], train: float, val: float, block: int, rng: np.random.Generator
) -> tuple[Mask, Mask]:
    rows, columns = (np.arange(n) // block for n in labels.shape)
    number = rows[:, None] * (columns.max() + 1) + columns[None]
    blocks = rng.permutation(number.max() + 1)
    first, second = max(1, round(train * len(blocks))), round(val * len(blocks))
    chosen = [np.isin(number, part) & (labels > 0) for part in (blocks[:first], blocks[first : first + second])]
    return chosen[0], chosen[1]


def grow(mask: Mask, radius: int) -> Mask:
    """A mask with all pixels within ``radius`` rows and columns of one of its own."""
    height, width = mask.shape
    padded = np.pad(mask.astype(np.int64), radius)
    sums = np.pad(padded.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    side = 2 * radius + 1
    boxes = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    return boxes[:height, :width] > 0


def split_overlap(split: HsiSplit, patch: int) -> float:
    """Share of test pixels whose patch holds a training pixel: 0 is honest, near 1 measures memory."""
    return float(grow(split.train, patch // 2)[split.test].mean())

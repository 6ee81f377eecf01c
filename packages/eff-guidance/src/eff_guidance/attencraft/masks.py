"""One mask for each concept and one for the background, and when new ones are believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WINDOW = 7


def make_concept_masks(refined: Tensor, threshold: float = 0.1) -> Tensor:
    """Which token each place belongs to.

    A place belongs to i if ``refined[i]`` exceeds all others there by more than the threshold.

    Args:
        refined: One map a token, [K, H, W], K at least 2.
        threshold: Difference.

    Returns:
        int64 [H, W], -1 where no token is clear.

    Raises:
        ValueError: fewer than two maps.
    """
    if refined.dim() != 3 or refined.shape[0] < 2:
        raise ValueError(f"refined maps {list(refined.shape)}; wanted [K, H, W] with K of at least 2")
    top, index = refined.topk(2, dim=0)
    return torch.where(top[0] - top[1] > threshold, index[0], -1)


def split_masks(labels: Tensor, count: int) -> Tensor:
    """Masks of ``count`` classes from labels [H, W]: float32 [count, H, W], disjoint."""
    return torch.stack([labels == i for i in range(count)]).float()


def tie_masks_to_tokens(refined: Tensor, masks: Tensor) -> list[int]:
    """For each mask the token whose map has the largest sum inside.

    Args:
        refined: [K, H, W].
        masks: [K, H, W].

    Raises:
        ValueError: a mask is empty, or two belong to one token.
    """
    if bool((masks.flatten(1).sum(1) == 0).any()):
        empty = (masks.flatten(1).sum(1) == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"the masks {empty} are empty; change the threshold, or the time at which they are found")
    ties: list[int] = (masks.flatten(1) @ refined.to(masks).flatten(1).mT).argmax(1).tolist()
    if len(set(ties)) < len(ties):
        raise ValueError(f"masks belong to the tokens {ties}; change the threshold, or the time they are found at")
    return ties


def ssim(one: Tensor, other: Tensor) -> float:
    """Mean structural similarity of two maps [H, W] with values from 0 to 1: window 7, as scikit-image's default.

    Raises:
        ValueError: they are smaller than the window, or differ in shape.
    """
    if one.shape != other.shape or one.dim() != 2 or min(one.shape) < _WINDOW:
        raise ValueError(f"maps {list(one.shape)} and {list(other.shape)}; wanted one shape, at least {_WINDOW} a side")
    x, y = one.double()[None, None], other.double()[None, None]

    def mean(t: Tensor) -> Tensor:
        return F.avg_pool2d(t, _WINDOW, stride=1)

    unbiased = _WINDOW**2 / (_WINDOW**2 - 1)
    mx, my = mean(x), mean(y)
    vx, vy = unbiased * (mean(x * x) - mx * mx), unbiased * (mean(y * y) - my * my)
    both = unbiased * (mean(x * y) - mx * my)
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(found.mean())


@dataclass(slots=True)
class MaskKeeper:
    """The masks that are believed.

    Attributes:
        threshold: See `make_concept_masks`.
        similarity: Least SSIM of each concept's new mask with the one that it would replace.
        every: Steps between attempts.
        masks: float32 [K + 1, H, W], the background last, or None before the first.
    """

    threshold: float = 0.1
    similarity: float = 0.8
    every: int = 20
    masks: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether masks are looked for in this step: 0, every, 2 * every, ..."""
        return step % self.every == 0

    def offer(self, refined: Tensor) -> bool:
        """Take new masks from refined maps [K + 1, H, W], the background's last, if they can be believed.

        The first must be right: its error is raised. Later ones are refused silently where they are not.

        Raises:
            ValueError: there are no masks yet, and these have no clear tie to their tokens.
        """
        masks = split_masks(make_concept_masks(refined, self.threshold), refined.shape[0])
        try:
            ties = tie_masks_to_tokens(refined, masks)
        except ValueError:
            if self.masks is None:
                raise
            return False
        masks = masks[torch.tensor(ties).argsort()]
        if self.masks is not None and self.masks.shape == masks.shape:
            pairs = zip(masks[:-1], self.masks[:-1], strict=True)
            if any(ssim(new, old) < self.similarity for new, old in pairs):
                return False
        self.masks = masks
        return True

    def state_dict(self) -> dict[str, Any]:
        """The masks, to go on from."""
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.masks = state["masks"]

"""Where a branch differs from what lies behind it: its outline (LayerBind, appendix A.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eff_guidance.layerbind.regions import Region

_BINS = 64
_SWEEPS = 24
_LEAST_SPREAD = 1e-5


class Foreground(NamedTuple):
    """What a layer covers.

    Attributes:
        alpha: How much of each token is the layer's, float32 [B, n], 0 to 1.
        mask: Whether it is the layer's at all, bool [B, n].
    """

    alpha: Tensor
    mask: Tensor


def estimate_foreground_alpha(
    branch: Tensor, current: Tensor, region: Region, *, gamma: float = 0.9, poisson_lambda: float = 0.5,
    core_component: bool = True,
) -> Foreground:  # fmt: skip
    """Find a layer's foreground from how far its branch has moved from the background.

    The distance z of each token is divided by the spread of the distances just outside a first Otsu mask, raised to
    2 gamma, smoothed by a screened Poisson equation, split by Otsu's threshold and tidied by morphology. Where nothing
    is left, the whole region is foreground.

    Args:
        branch: Latents of the branch, [B, n, C].
        current: Latents in its place, [B, n, C].
        region: Where the tokens lie.
        gamma: Half the exponent of the score.
        poisson_lambda: How close the smoothed score keeps to the score.
        core_component: Whether, in a box, only the connected part in its middle is kept.

    Returns:
        Alpha and mask of the tokens.
    """
    z = region.to_map((branch.float() - current.float()).norm(dim=-1))
    found = [_one(each, region, gamma, poisson_lambda, core_component and region.is_box) for each in z]
    alpha, mask = (torch.stack(part) for part in zip(*found, strict=True))
    return Foreground(region.from_map(alpha), region.from_map(mask))


def _one(z: Tensor, region: Region, gamma: float, weight: float, core: bool) -> tuple[Tensor, Tensor]:
    inside = region.inside
    if otsu_threshold(z[inside]) is None:  # nothing stands out
        return inside.float(), inside
    score = (z / _spread(z, inside)).pow(2 * gamma) * inside
    # Huge ratios of flat maps would overflow; Otsu's split does not change under a common factor.
    score = score / score.max().clamp(min=1e-30)
    smooth = screened_poisson(score, weight) * inside
    binary = _otsu_map(smooth, inside)
    binary = _tidy(binary, inside)
    if core and binary.any():
        binary = central_component(binary)
    if not binary.any():
        return inside.float(), inside
    alpha = smooth * binary
    return (alpha / alpha.max().clamp(min=1e-30)).clamp(0, 1), binary


def _spread(z: Tensor, inside: Tensor) -> Tensor:
    """Spread of the distances of what is likely background: 1.4826 times the median absolute deviation."""
    first = _otsu_map(z, inside)
    for background in (_dilate(first) & ~first & inside, ~first & inside, inside):
        if background.any():
            values = z[background]
            break
    return (1.4826 * (values - values.median()).abs().median()).clamp(min=_LEAST_SPREAD)


def otsu_threshold(values: Tensor, bins: int = _BINS) -> Tensor | None:
    """The value that best splits numbers into two groups (Otsu), or None if they are all the same.

    Args:
        values: [n].
        bins: Of the histogram.
    """
    values = values.float()
    low, high = values.min(), values.max()
    if not high > low:
        return None
    place = ((values - low) / (high - low) * bins).long().clamp(max=bins - 1)
    share = torch.bincount(place, minlength=bins).float() / len(values)
    level = torch.arange(bins, dtype=torch.float32, device=values.device) + 0.5
    below, moment = share.cumsum(0)[:-1], (share * level).cumsum(0)
    between = (moment[-1] * below - moment[:-1]).square() / (below * (1 - below)).clamp(min=1e-12)
    return low + (between.argmax() + 1) / bins * (high - low)


def _otsu_map(values: Tensor, inside: Tensor) -> Tensor:
    threshold = otsu_threshold(values[inside])
    return inside.clone() if threshold is None else (values >= threshold) & inside


def screened_poisson(score: Tensor, weight: float, sweeps: int = _SWEEPS) -> Tensor:
    """Smooth a map [h, w] by Jacobi sweeps a <- (sum of 4 neighbours + weight * score) / (4 + weight).

    The start is the mean of 3 x 3; beyond the border there are zeros.
    """
    cross = score.new_tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
    a = F.avg_pool2d(score[None, None], 3, stride=1, padding=1)
    for _ in range(sweeps):
        a = (F.conv2d(a, cross, padding=1) + weight * score) / (4 + weight)
    return a[0, 0]


def _dilate(mask: Tensor) -> Tensor:
    return F.max_pool2d(mask.float()[None, None], 3, stride=1, padding=1)[0, 0] > 0


def _erode(mask: Tensor) -> Tensor:
    return ~_dilate(~mask)


def _tidy(mask: Tensor, inside: Tensor) -> Tensor:
    closed = _erode(_dilate(mask))
    opened = _dilate(_erode(closed))
    return _dilate(opened) & inside


def central_component(mask: Tensor) -> Tensor:
    """The connected part of a mask [h, w] that holds most of the middle half; the mask itself if none reaches there."""
    high, wide = mask.shape
    label = torch.arange(1, high * wide + 1, device=mask.device, dtype=torch.float32).view(high, wide) * mask
    while True:  # each part takes its largest number
        grown = F.max_pool2d(label[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(grown, label):
            break
        label = grown
    y, x = high // 4, wide // 4
    middle = label[y : high - y, x : wide - x]
    middle = middle[middle > 0]
    if not len(middle):
        return mask
    names, counts = middle.unique(return_counts=True)
    return label == names[counts.argmax()]

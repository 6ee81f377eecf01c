"""A simulated cortex in which it is known what each region follows: content, or place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_vision.brain_encoder.rois import RoiMasks


class SyntheticBrain(NamedTuple):
    """Simulated data.

    Attributes:
        features: Patches of the pictures, [N, 36, 16], a 6 x 6 grid.
        responses: [N, V], z-scored over all items.
        rois: Three regions that read the patch which holds their prototype, and one that reads a fixed patch.
        patch: For each picture the patch of each prototype, [N, 3].
        grid: (6, 6).
    """

    features: Tensor
    responses: Tensor
    rois: RoiMasks
    patch: Tensor
    grid: tuple[int, int]


PLACE = 14  # the patch that the place region reads


def make_synthetic_brain(num: int, *, seed: int = 0, noise: float = 0.5, vertices: int = 20) -> SyntheticBrain:
    """Simulate ``num`` pictures and the responses of four regions of ``vertices`` vertices each.

    Each picture is noise with three prototypes of length 4 added to three random patches. The weights of the regions
    and the prototypes depend on the seed alone, so that two sets of one seed and different ``num`` share them only when
    one is cut from the other: make one set and split it.
    """
    if num < 2 or vertices < 1 or noise < 0:
        raise ValueError(f"wanted num >= 2, vertices >= 1, noise >= 0, got {num}, {vertices}, {noise}")
    g = torch.Generator().manual_seed(seed)
    prototypes = torch.nn.functional.normalize(torch.randn(3, 16, generator=g), dim=1) * 4
    weights = torch.randn(4, vertices, 16, generator=g)
    features = torch.randn(num, 36, 16, generator=g)
    patch = torch.rand(num, 36, generator=g).argsort(1)[:, :3]
    rows = torch.arange(num)
    for c in range(3):
        features[rows, patch[:, c]] += prototypes[c]
    read = [features[rows, patch[:, c]] @ weights[c].T for c in range(3)] + [features[:, PLACE] @ weights[3].T]
    clean = torch.cat([(r - r.mean(0)) / r.std(0) for r in read], 1)
    responses = clean + noise * torch.randn(clean.shape, generator=g)
    labels = torch.arange(4).repeat_interleave(vertices)
    rois = RoiMasks.from_labels(labels, ["content 0", "content 1", "content 2", "place"], rest=-1)
    return SyntheticBrain(features, (responses - responses.mean(0)) / responses.std(0), rois, patch, (6, 6))

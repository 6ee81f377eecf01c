"""Indian Pines: an airborne hyperspectral picture with ground truth, from the package tensorly."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eff_embedded.data.packages import package_file

_EXTRA = "eff-embedded[hyperspectral]"
# Bands of the sensor whose light water vapour takes; the "corrected" cube is without them, counted from 1.
_WATER = (*range(104, 109), *range(150, 164), 220)

INDIAN_PINES_CLASSES = (
    "Alfalfa",
    "Corn-notill",
    "Corn-mintill",
    "Corn",
    "Grass-pasture",
    "Grass-trees",
    "Grass-pasture-mowed",
    "Hay-windrowed",
    "Oats",
    "Soybean-notill",
    "Soybean-mintill",
    "Soybean-clean",
    "Wheat",
    "Woods",
    "Buildings-Grass-Trees-Drives",
    "Stone-Steel-Towers",
)


class HyperspectralScene(NamedTuple):
    """A picture with many bands.

    Attributes:
        cube: [bands, H, W], float32, as the sensor counts.
        labels: [H, W], int64: 0 where nothing is known, else 1 + the place in ``classes``.
        classes: Names.
        bands: Number of each band of the cube in the sensor's 220, counted from 1, [bands], int64.
    """

    cube: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    bands: Tensor


def indian_pines() -> HyperspectralScene:
    """AVIRIS Indian Pines of 12 June 1992: 145 x 145 pixels of 20 m, 200 bands without those of water, 16 classes.

    Neighbouring pixels are alike: split by blocks, or scores measure memory. Cite Baumgardner, Biehl and Landgrebe,
    doi:10.4231/R7RX991C.

    Raises:
        ImportError: tensorly is not installed.
    """
    parts = [
        np.load(package_file("tensorly", "datasets", "data", f"Indian_pines_{part}.npy", install=_EXTRA))
        for part in ("corrected", "gt")
    ]
    cube = torch.from_numpy(np.ascontiguousarray(parts[0].transpose(2, 0, 1).astype(np.float32)))
    bands = torch.tensor([b for b in range(1, 221) if b not in _WATER])
    return HyperspectralScene(cube, torch.from_numpy(parts[1].astype(np.int64)), INDIAN_PINES_CLASSES, bands)

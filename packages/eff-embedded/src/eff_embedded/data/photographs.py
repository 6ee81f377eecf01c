"""Photographs of scikit-image's wheel: single pictures, and a stereo pair with its true disparity."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eff_embedded.data.packages import package_file

_EXTRA = "eff-embedded[photographs]"
_FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "cells": "ihc.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "moon": "moon.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}

PHOTOGRAPHS = tuple(_FILES)
"""Names that `photograph` takes; "brick", "camera", "coins", "grass", "gravel" and "moon" are grey."""


def photograph(name: str) -> Image.Image:
    """One of the photographs as an RGB picture, in the size that the wheel holds.

    Raises:
        ValueError: the name is not in `PHOTOGRAPHS`.
        ImportError: scikit-image is not installed.
    """
    if name not in _FILES:
        raise ValueError(f"no photograph {name!r}; there are {', '.join(PHOTOGRAPHS)}")
    with Image.open(package_file("skimage", "data", _FILES[name], install=_EXTRA)) as picture:
        return picture.convert("RGB")


class StereoPair(NamedTuple):
    """Two views of one scene, rectified, so that a point is in the same row of both.

    Attributes:
        left: [3, H, W], float32 between 0 and 1.
        right: Like ``left``.
        disparity: [H, W], float32, in pixels: what is at (u, v) on the left is at (u - disparity, v) on the right.
        valid: [H, W], where the disparity is known.
        focal: Focal length in pixels.
        baseline: Distance of the cameras in metres.
        offset: Column of the right principal point minus that of the left, in pixels.
    """

    left: Tensor
    right: Tensor
    disparity: Tensor
    valid: Tensor
    focal: float
    baseline: float
    offset: float

    def depth(self) -> Tensor:
        """z-depth of the left view in metres, [H, W]; infinite where the disparity is not known."""
        depth = self.baseline * self.focal / (self.disparity + self.offset)
        return torch.where(self.valid, depth, torch.inf)


def motorcycle_stereo() -> StereoPair:
    """The motorcycle of the Middlebury 2014 stereo data, 741 x 500 pixels.

    Camera and baseline are those that the data set publishes for the full size, divided by four like the pictures.

    Raises:
        ImportError: scikit-image is not installed.
    """
    views = []
    for side in ("left", "right"):
        with Image.open(package_file("skimage", "data", f"motorcycle_{side}.png", install=_EXTRA)) as picture:
            views.append(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1) / 255)
    with np.load(package_file("skimage", "data", "motorcycle_disp.npz", install=_EXTRA)) as file:
        disparity = torch.from_numpy(file["arr_0"].astype(np.float32))
    valid = disparity.isfinite()
    # Calibration of "Motorcycle-perfect" (full size): f = 3979.911 px, baseline = 193.001 mm, doffs = 124.343 px.
    focal, baseline, offset = 3979.911 / 4, 0.193001, 124.343 / 4
    return StereoPair(views[0], views[1], disparity.where(valid, torch.zeros(())), valid, focal, baseline, offset)

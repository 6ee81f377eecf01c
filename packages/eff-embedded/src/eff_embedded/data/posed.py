"""Photographs with known cameras: Villa del Balbianello, from the package gtsam."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eff_embedded.data.packages import package_file

_EXTRA = "eff-embedded[posed]"


class PosedPhotographs(NamedTuple):
    """Photographs of one place with their cameras, in the conventions of `eff_embedded.scenes`.

    The unit of length is free, as in every reconstruction from pictures alone.

    Attributes:
        images: [S, 3, H, W], float32 between 0 and 1, as taken: the lens bends straight lines.
        intrinsics: [S, 3, 3] in pixels, float64.
        distortion: Coefficients k1 and k2, [S, 2]: a point at x = X / Z is seen as if at x * (1 + k1 r^2 + k2 r^4).
        extrinsics: World to camera, [S, 4, 4], float64.
        points: Points that were found in several photographs, [N, 3], float64.
        colours: Their colours, [N, 3], float32 between 0 and 1.
        views: Photograph of each observation, [M], int64.
        tracks: Point of each observation, [M], int64.
        pixels: Where it was seen, (u, v), [M, 2], float64.
    """

    images: Tensor
    intrinsics: Tensor
    distortion: Tensor
    extrinsics: Tensor
    points: Tensor
    colours: Tensor
    views: Tensor
    tracks: Tensor
    pixels: Tensor

    def project(self, view: int, points: Tensor) -> tuple[Tensor, Tensor]:
        """Where a camera sees points [N, 3], with the bend of its lens: (u, v) [N, 2], and z-depths [N]."""
        pose, k = self.extrinsics[view], self.intrinsics[view]
        seen = points @ pose[:3, :3].T + pose[:3, 3]
        flat = seen[:, :2] / seen[:, 2:]
        square = flat.square().sum(1, keepdim=True)
        k1, k2 = self.distortion[view]
        bent = flat * (1 + k1 * square + k2 * square.square())
        return bent * torch.stack([k[0, 0], k[1, 1]]) + k[:2, 2], seen[:, 2]


def balbianello() -> PosedPhotographs:
    """Five photographs of 640 x 427 pixels with cameras and 544 points, reconstructed by Bundler.

    Raises:
        ImportError: gtsam is not installed.
    """
    images = []
    for k in range(1, 6):
        path = package_file("gtsam", "Data", "Balbianello", f"BalbianelloMedium-{k}.jpg", install=_EXTRA)
        with Image.open(path) as picture:
            images.append(torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1) / 255)
    stacked = torch.stack(images)
    height, width = stacked.shape[-2:]
    text = package_file("gtsam", "Data", "Balbianello.out", install=_EXTRA).read_text(encoding="ascii")
    words = iter(text.split("\n", 1)[1].split())

    def numbers(count: int) -> np.ndarray:
        return np.array([float(next(words)) for _ in range(count)])

    num_cameras, num_points = (int(n) for n in numbers(2))
    intrinsics, distortion, extrinsics = [], [], []
    # Bundler's cameras look along -z with y up; those of OpenCV along z with y down.
    flip = np.diag([1.0, -1.0, -1.0])
    for _ in range(num_cameras):
        focal, k1, k2 = numbers(3)
        pose = np.eye(4)
        pose[:3, :3] = flip @ numbers(9).reshape(3, 3)
        pose[:3, 3] = flip @ numbers(3)
        intrinsics.append(np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]))
        distortion.append([k1, k2])
        extrinsics.append(pose)
    points, colours, seen = [], [], []
    for track in range(num_points):
        points.append(numbers(3))
        colours.append(numbers(3) / 255)
        for _ in range(int(next(words))):
            view, _, x, y = numbers(4)
            seen.append((view, track, width / 2 + x, height / 2 - y))
    table = torch.tensor(seen, dtype=torch.float64)
    return PosedPhotographs(
        images=stacked,
        intrinsics=torch.from_numpy(np.array(intrinsics)),
        distortion=torch.tensor(distortion, dtype=torch.float64),
        extrinsics=torch.from_numpy(np.array(extrinsics)),
        points=torch.from_numpy(np.array(points)),
        colours=torch.from_numpy(np.array(colours)).float(),
        views=table[:, 0].long(),
        tracks=table[:, 1].long(),
        pixels=table[:, 2:],
    )

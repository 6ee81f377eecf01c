"""Cameras with the names of their pictures."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from eff_vision.geometry.cameras import check_intrinsics
from eff_vision.geometry.poses import check_pose


class PosedViews(NamedTuple):
    """Pictures of one scene and their cameras.

    Attributes:
        names: Files of the pictures.
        size: Rows and columns, one size for all.
        extrinsics: World to camera, float64 [S, 3, 4].
        intrinsics: In pixels, float64 [S, 3, 3].
    """

    names: tuple[str, ...]
    size: tuple[int, int]
    extrinsics: Tensor
    intrinsics: Tensor

    def checked(self) -> PosedViews:
        """The same in float64.

        Raises:
            ValueError: numbers of names and cameras differ, a camera is none, or a name cannot stand in a file.
        """
        count = len(self.names)
        if self.extrinsics.shape[:1] != (count,) or self.intrinsics.shape != (count, 3, 3):
            shapes = list(self.extrinsics.shape), list(self.intrinsics.shape)
            raise ValueError(f"{count} names with extrinsics {shapes[0]} and intrinsics {shapes[1]}")
        check_pose(self.extrinsics)
        check_intrinsics(self.intrinsics)
        if bad := [n for n in self.names if not n or any(c in n for c in "\r\n")]:
            raise ValueError(f"{bad[0]!r} cannot be the name of a picture")
        return self._replace(
            extrinsics=self.extrinsics[:, :3].detach().cpu().to(torch.float64),
            intrinsics=self.intrinsics.detach().cpu().to(torch.float64),
        )

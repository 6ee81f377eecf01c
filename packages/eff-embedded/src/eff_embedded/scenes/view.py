"""The maps of a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eff_embedded.scenes.vocabulary import VOID


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A picture of a scene with its labels, all at pixel centres; several of one size are stacked along a first axis.

    Floating maps are float32 unless asked otherwise. Where a ray meets nothing (only in scenes without a room) depth
    and distance are infinite, points and normals zero, the instance is -1 and the class `VOID`.

    Attributes:
        colour: Red, green and blue between 0 and 1, [3, H, W].
        depth: z in the frame of the camera in metres, [H, W]; negative behind the camera of a panorama.
        distance: From the camera to the point in metres, [H, W].
        points: In the world, in metres, [3, H, W].
        normals: Unit, in the world, towards the free side, [3, H, W].
        camera_normals: The same in the frame of the camera, [3, H, W].
        instances: Number of the object, -1 for the room, [H, W], int64.
        classes: Place in `CLASSES`, [H, W], int64.
        visible: Where each object is seen, [K, H, W], bool. No pixel belongs to two.
        full: Where each would be seen without the others (amodal), [K, H, W], bool.
        intrinsics: [3, 3] in pixels; None for a panorama.
        extrinsics: World to camera, [4, 4].
        time: In seconds, scalar tensor.
        names: Of the K objects.
    """

    colour: Tensor
    depth: Tensor
    distance: Tensor
    points: Tensor
    normals: Tensor
    camera_normals: Tensor
    instances: Tensor
    classes: Tensor
    visible: Tensor
    full: Tensor
    intrinsics: Tensor | None
    extrinsics: Tensor
    time: Tensor
    names: tuple[str, ...]

    @property
    def valid(self) -> Tensor:
        """Where a surface is seen, [H, W], bool."""
        return self.classes != VOID

    @staticmethod
    def stack(views: Sequence[View]) -> View:
        """Views of one scene through lenses of one size, along a new first axis.

        Raises:
            ValueError: there is none, or they differ in objects, size or kind of lens.
        """
        if not views:
            raise ValueError("there are no views to stack")
        kinds = {(v.names, tuple(v.colour.shape), v.intrinsics is None) for v in views}
        if len(kinds) > 1:
            raise ValueError(f"views differ in objects, size or kind of lens: {sorted(map(str, kinds))}")
        columns = {f.name: [getattr(v, f.name) for v in views] for f in dataclasses.fields(View)}
        names = columns.pop("names")[0]
        stacked: dict[str, Any] = {k: None if c[0] is None else torch.stack(c) for k, c in columns.items()}
        return View(names=names, **stacked)

    def in_frame_of_first(self) -> View:
        """The same stacked views with the first camera as the world: its extrinsics become the identity.

        Raises:
            ValueError: the views are not stacked.
        """
        if self.extrinsics.dim() != 3:
            raise ValueError("only stacked views have a first one; see View.stack")
        first = self.extrinsics[0]
        rotation, shift = first[:3, :3], first[:3, 3]
        # A rigid inverse by its transpose, so that the first camera comes out as exactly the identity.
        back = torch.eye(4, dtype=first.dtype)
        back[:3, :3], back[:3, 3] = rotation.T, -(rotation.T @ shift)
        extrinsics = self.extrinsics @ back
        extrinsics[0] = torch.eye(4, dtype=first.dtype)
        points = torch.einsum("ij,sjhw->sihw", rotation, self.points) + shift[:, None, None]
        return dataclasses.replace(
            self,
            extrinsics=extrinsics,
            points=torch.where(self.valid[:, None], points, torch.zeros((), dtype=points.dtype)),
            normals=torch.einsum("ij,sjhw->sihw", rotation, self.normals),
        )

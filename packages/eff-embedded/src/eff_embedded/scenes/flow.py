"""Where surface points go between two pictures: optical flow with moving cameras and objects."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eff_embedded.scenes.cameras import Camera, Equirectangular
from eff_embedded.scenes.cast import Placed, blocked, check_place, first_hits
from eff_embedded.scenes.geometry import Array
from eff_embedded.scenes.scene import Scene


class Flow(NamedTuple):
    """Optical flow from one picture to another.

    Attributes:
        flow: [2, H, W] in pixels, (right, down): what is at (u, v) of the first is at (u, v) + flow of the second. In
            panoramas the shorter way round. Zero where the point is behind the second camera, or there is none.
        seen: Where the point is inside the second picture and nothing hides it there, [H, W], bool.
    """

    flow: Tensor
    seen: Tensor


def optical_flow(
    scene: Scene,
    camera: Camera,
    time: float,
    other: Camera,
    other_time: float,
    *,
    dtype: torch.dtype = torch.float32,
) -> Flow:
    """Flow from the picture of ``camera`` at ``time`` to that of ``other`` at ``other_time``.

    Exact: the point that a pixel centre shows is moved with its object and projected.

    Raises:
        ValueError: a camera is in an object or outside of the room.
    """
    before, after = Placed.at(scene, time), Placed.at(scene, other_time)
    check_place(before, camera)
    check_place(after, other)
    origin = np.array(camera.position)
    directions = camera.extrinsics[:3, :3].T @ camera.lens.rays()
    distance, owner, _ = first_hits(before, origin, directions, alone=False)
    met = owner != before.void
    points = _carry(before, after, origin[:, None] + np.where(met, distance, 0.0) * directions, owner)

    pose, eye = other.extrinsics, np.array(other.position)
    target, inside = other.lens.project(pose[:3, :3] @ (points - eye[:, None]))
    lens = camera.lens
    v, u = np.divmod(np.arange(lens.width * lens.height), lens.width)
    flow = target - (np.stack([u, v]) + 0.5)
    if isinstance(other.lens, Equirectangular):
        flow[0] -= np.round(flow[0] / other.lens.width) * other.lens.width
    seen = met & inside
    at = np.flatnonzero(seen)
    seen[at] &= ~blocked(after, eye, points[:, at] - eye[:, None])
    in_front = isinstance(other.lens, Equirectangular) | ((pose[2, :3] @ (points - eye[:, None])) > 0)
    flow = np.where(met & in_front, flow, 0.0)
    shape = (lens.height, lens.width)
    return Flow(torch.from_numpy(flow.reshape(2, *shape)).to(dtype), torch.from_numpy(seen.reshape(shape)))


def _carry(before: Placed, after: Placed, points: Array, owner: Array) -> Array:
    """Where points [3, N] of the surfaces of owners [N] are after the objects have moved."""
    for k in range(len(before.scene.objects)):
        at = np.flatnonzero(owner == k)
        if at.size:
            turn = after.rotations[k] @ before.rotations[k].T
            points[:, at] = turn @ (points[:, at] - before.centres[k][:, None]) + after.centres[k][:, None]
    return points

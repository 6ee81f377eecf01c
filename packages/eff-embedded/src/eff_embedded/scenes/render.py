"""Pictures of scenes with all their maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eff_embedded.scenes.cameras import Camera, Lens, Pinhole
from eff_embedded.scenes.cast import Placed, check_place, first_hits
from eff_embedded.scenes.geometry import Array
from eff_embedded.scenes.scene import Scene
from eff_embedded.scenes.shade import lit, surfaces
from eff_embedded.scenes.view import View
from eff_embedded.scenes.vocabulary import CLASSES, VOID

_RAYS = 16384


def render(
    scene: Scene, camera: Camera, time: float = 0.0, *, antialias: int = 1, dtype: torch.dtype = torch.float32
) -> View:
    """A picture of a scene with all its maps. Computed in float64, so that only the last rounding is left.

    Args:
        scene: What to look at.
        camera: From where.
        time: In seconds.
        antialias: Colours are means of ``antialias`` squared rays through each pixel; labels are those of its centre.
        dtype: Of the floating maps.

    Raises:
        ValueError: the camera is in an object or outside of the room, or ``antialias`` is not positive.
    """
    if antialias < 1:
        raise ValueError(f"antialias={antialias}; it must be at least 1")
    placed, lens = Placed.at(scene, time), camera.lens
    check_place(placed, camera)
    pose = camera.extrinsics
    rotation, origin = pose[:3, :3], np.array(camera.position)
    rays = lens.rays()
    directions = rotation.T @ rays
    distance, owner, full = first_hits(placed, origin, directions, alone=True)
    met = owner != placed.void
    points = origin[:, None] + np.where(met, distance, 0.0) * directions
    if not met.all():
        points[:, ~met] = 0.0
    normals, colours = surfaces(placed, points, owner)
    if antialias == 1:
        colours = lit(placed, points, normals, colours, owner)
    else:
        colours = _fine_colours(placed, lens.finer(antialias), rotation, origin)
        colours = colours.reshape(3, lens.height, antialias, lens.width, antialias).mean((2, 4))
    classes, instances = _labels(scene)
    length = np.sqrt(np.einsum("ij,ij->j", rays, rays))

    def maps(values: Array, kind: torch.dtype = dtype) -> Tensor:
        shape = (*values.shape[:-1], lens.height, lens.width)
        return torch.from_numpy(np.ascontiguousarray(values)).reshape(shape).to(kind)

    return View(
        colour=maps(colours.reshape(3, -1)),
        depth=maps(np.where(met, distance * rays[2], np.inf)),
        distance=maps(distance * length),
        points=maps(points),
        normals=maps(normals),
        camera_normals=maps(rotation @ normals),
        instances=maps(instances[owner], torch.int64),
        classes=maps(classes[owner], torch.int64),
        visible=maps(owner == np.arange(len(scene.objects))[:, None], torch.bool),
        full=maps(full, torch.bool) if full is not None else torch.empty(0),
        intrinsics=intrinsics(lens, dtype),
        extrinsics=torch.from_numpy(pose).to(dtype),
        time=torch.tensor(time, dtype=dtype),
        names=scene.names,
    )


def render_views(
    scene: Scene,
    cameras: Sequence[Camera],
    times: Sequence[float] | float = 0.0,
    *,
    antialias: int = 1,
    dtype: torch.dtype = torch.float32,
) -> View:
    """Several pictures of a scene, stacked.

    Args:
        scene: What to look at.
        cameras: With lenses of one size and kind.
        times: One for all in seconds, or one for each.
        antialias: See `render`.
        dtype: Of the floating maps.

    Raises:
        ValueError: numbers of cameras and times differ; and as `render` and `View.stack`.
    """
    moments = [float(times)] * len(cameras) if isinstance(times, (int, float)) else list(times)
    if len(moments) != len(cameras):
        raise ValueError(f"{len(cameras)} cameras and {len(moments)} times; give one time for each camera, or one")
    pairs = zip(cameras, moments, strict=True)
    return View.stack([render(scene, c, t, antialias=antialias, dtype=dtype) for c, t in pairs])


def intrinsics(lens: Lens, dtype: torch.dtype) -> Tensor | None:
    """Intrinsics [3, 3] of a pinhole lens, None of a panorama."""
    return torch.from_numpy(lens.matrix()).to(dtype) if isinstance(lens, Pinhole) else None


def _fine_colours(placed: Placed, lens: Lens, rotation: Array, origin: Array) -> Array:
    """Colours [3, height * width], a part of the rays at a time so that the work stays in the cache."""
    rays = lens.rays()
    colours = np.empty_like(rays)
    for start in range(0, rays.shape[1], _RAYS):
        directions = rotation.T @ rays[:, start : start + _RAYS]
        distance, owner, _ = first_hits(placed, origin, directions, alone=False)
        points = origin[:, None] + np.where(owner != placed.void, distance, 0.0) * directions
        normals, plain = surfaces(placed, points, owner)
        colours[:, start : start + _RAYS] = lit(placed, points, normals, plain, owner)
    return colours


def _labels(scene: Scene) -> tuple[Array, Array]:
    """Class and instance of each owner, see `Placed`: objects, sides of the room (left, right, ...), nothing."""
    wall, ceiling, floor = CLASSES.index("wall"), CLASSES.index("ceiling"), CLASSES.index("floor")
    sides = [wall, wall, ceiling, floor, wall, wall]
    count = len(scene.objects)
    return (
        np.array([*(CLASSES.index(name) for name in scene.names), *sides, VOID]),
        np.array([*range(count), *[-1] * 7]),
    )

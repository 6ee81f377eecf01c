"""Random cameras for a scene: single ones, panoramas, paths for clips, sets that see the same things."""

from __future__ import annotations

import math

import numpy as np

from eff_embedded.scenes.cameras import Camera, Equirectangular, Lens, Pinhole
from eff_embedded.scenes.geometry import Array
from eff_embedded.scenes.make import free_of
from eff_embedded.scenes.scene import Room, Scene

_GAP = 0.45  # metres between a camera and what it sees
_TRIES = 200


def make_camera(scene: Scene, *, seed: int, size: tuple[int, int] = (128, 128), duration: float = 1.0) -> Camera:
    """A camera near the border of the room, at the height of eyes, that looks at the objects.

    Args:
        scene: With a room.
        seed: Any whole number from 0 up.
        size: Width and height of the picture in pixels.
        duration: Seconds from time 0 for which no object may come near.

    Raises:
        ValueError: the scene has no room, or no free place was found.
    """
    rng = np.random.default_rng((seed, 1))
    lens = Pinhole.from_fov(*size, float(rng.uniform(60, 75)))
    return Camera.look_at(lens, _eye(scene, rng, float(rng.uniform(0, 2 * math.pi)), duration), _target(scene, rng))


def make_panorama(scene: Scene, *, seed: int, height: int = 128, duration: float = 1.0) -> Camera:
    """A level panorama camera at a free place in the middle of the room, twice as wide as high, turned at will.

    Raises:
        ValueError: the scene has no room, or no free place was found.
    """
    rng = np.random.default_rng((seed, 2))
    room = _room(scene)
    for k in range(_TRIES):
        reach = 0.15 + 0.25 * k / _TRIES
        x, z = (float(rng.uniform(-reach, reach)) * side for side in (room.size[0], room.size[2]))
        place = np.array([x, -float(rng.uniform(1.2, 1.8)), z])
        if free_of(scene.objects, place, duration, _GAP):
            lens = Equirectangular(width=2 * height, height=height)
            return Camera.level(lens, place, yaw=float(rng.uniform(-180, 180)))
    raise ValueError(f"no free place for a panorama among {len(scene.objects)} objects; ask for fewer or a larger room")


def make_path(
    scene: Scene,
    frames: int,
    *,
    seed: int,
    size: tuple[int, int] = (128, 128),
    duration: float = 1.0,
    sweep: float = 40.0,
) -> list[Camera]:
    """Cameras of a clip: one that moves round the objects, smoothly, and keeps looking at them.

    Args:
        scene: With a room.
        frames: Number of pictures.
        seed: Any whole number from 0 up.
        size: Width and height of the pictures in pixels.
        duration: Seconds from time 0 for which no object may come near.
        sweep: Degrees by which it goes round the middle of the room; negative ones go the other way.

    Raises:
        ValueError: there are no frames, the scene has no room, or no free path was found.
    """
    if frames < 1:
        raise ValueError(f"frames={frames}; a clip has at least one")
    rng = np.random.default_rng((seed, 3))
    lens, target = Pinhole.from_fov(*size, float(rng.uniform(60, 75))), _target(scene, rng)
    ease = np.linspace(0, 1, frames) if frames > 1 else np.zeros(1)
    for _ in range(_TRIES):
        start, height = float(rng.uniform(0, 360)), -float(rng.uniform(1.1, 1.7))
        rise, reach = float(rng.uniform(-0.2, 0.2)), float(rng.uniform(0.40, 0.45))
        angles = np.radians(start + sweep * ease)
        eyes = [_border(_room(scene), a, reach, height + rise * e) for a, e in zip(angles, ease, strict=True)]
        if all(free_of(scene.objects, eye, duration, _GAP) for eye in eyes):
            return [Camera.look_at(lens, eye, target) for eye in eyes]
    raise ValueError(f"no free path among {len(scene.objects)} objects; ask for fewer, a larger room, a smaller sweep")


def make_views(
    scene: Scene,
    count: int,
    *,
    seed: int,
    size: tuple[int, int] = (128, 128),
    duration: float = 1.0,
    spread: float = 40.0,
) -> list[Camera]:
    """Cameras that see the same objects from several sides through one lens.

    Args:
        scene: With a room.
        count: Number of cameras.
        seed: Any whole number from 0 up.
        size: Width and height of the pictures in pixels.
        duration: Seconds from time 0 for which no object may come near.
        spread: Degrees round the middle of the room in which they stand, up to 360.

    Raises:
        ValueError: there are no cameras, the scene has no room, or no free place was found.
    """
    if count < 1:
        raise ValueError(f"count={count}; a set has at least one camera")
    rng = np.random.default_rng((seed, 4))
    lens, target = Pinhole.from_fov(*size, float(rng.uniform(60, 75))), _target(scene, rng)
    start = float(rng.uniform(0, 360))
    cameras = []
    for k in range(count):
        angle = math.radians(start + spread * (k + float(rng.uniform(0.2, 0.8))) / count)
        jitter = rng.uniform(-0.15, 0.15, size=3)
        cameras.append(Camera.look_at(lens, _eye(scene, rng, angle, duration), target + jitter))
    return cameras


def resized(camera: Camera, lens: Lens) -> Camera:
    """The camera with another lens at the same place."""
    return Camera(lens=lens, world_to_camera=camera.world_to_camera)


def _room(scene: Scene) -> Room:
    if scene.room is None:
        raise ValueError("the scene has no room to place a camera in; give a Camera of your own")
    return scene.room


def _target(scene: Scene, rng: np.random.Generator) -> Array:
    """A point near the middle of the objects."""
    centres = np.array([o.centre for o in scene.objects] or [(0.0, -0.8, 0.0)])
    return centres.mean(0) * (0.7, 0.8, 0.7) + rng.uniform(-0.1, 0.1, size=3)


def _border(room: Room, angle: float, reach: float, y: float) -> Array:
    """A place on the ellipse that takes up a share ``2 * reach`` of the room."""
    return np.array([reach * room.size[0] * math.sin(angle), y, -reach * room.size[2] * math.cos(angle)])


def _eye(scene: Scene, rng: np.random.Generator, angle: float, duration: float) -> Array:
    """A free place near the border of the room in about that direction from the middle."""
    for k in range(_TRIES):
        turned = angle + float(rng.normal()) * math.pi * k / _TRIES
        eye = _border(_room(scene), turned, float(rng.uniform(0.38, 0.46)), -float(rng.uniform(1.1, 1.8)))
        if free_of(scene.objects, eye, duration, _GAP):
            return eye
    raise ValueError(f"no free place for a camera among {len(scene.objects)} objects; ask for fewer or a larger room")

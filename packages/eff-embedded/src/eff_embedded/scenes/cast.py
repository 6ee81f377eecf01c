"""Casting rays that share an origin: what each meets first, and which objects it would meet alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eff_embedded.scenes.cameras import Camera
from eff_embedded.scenes.geometry import Array
from eff_embedded.scenes.scene import Room, Scene, SceneObject
from eff_embedded.scenes.shapes import contains, enter


@dataclass(frozen=True, slots=True)
class Placed:
    """A scene at one time.

    An owner of a ray is a number: that of an object, then the six sides of the room, then nothing.

    Attributes:
        scene: The scene.
        rotations: From the frame of each object to the world, [K, 3, 3].
        centres: [K, 3].
    """

    scene: Scene
    rotations: Array
    centres: Array

    @classmethod
    def at(cls, scene: Scene, time: float) -> Placed:
        """The scene at a time in seconds."""
        poses = [o.pose(time) for o in scene.objects]
        rotations = np.array([r for r, _ in poses]).reshape(-1, 3, 3)
        return cls(scene, rotations, np.array([c for _, c in poses]).reshape(-1, 3))

    @property
    def void(self) -> int:
        """The owner of rays that meet nothing."""
        return len(self.scene.objects) + 6

    def candidates(self, origin: Array, directions: Array) -> list[Array]:
        """For each object the rays [n] that pass through the ball around it: the only ones worth trying."""
        if not self.scene.objects:
            return []
        towards = self.centres - origin
        margin = (towards * towards).sum(1) - np.array([o.radius for o in self.scene.objects]) ** 2
        along = towards @ directions
        length = np.sqrt(np.einsum("ij,ij->j", directions, directions))
        # The angle to the middle is at most that of the ball; an origin in the ball may look anywhere.
        least = np.sqrt(np.maximum(margin, 0.0))
        return [
            np.flatnonzero(along[k] >= least[k] * length) if margin[k] > 0 else np.arange(length.size)
            for k in range(len(margin))
        ]

    def enter(self, k: int, origin: Array, directions: Array) -> Array:
        """Distances [n] at which rays enter object k."""
        thing: SceneObject = self.scene.objects[k]
        turn = self.rotations[k].T
        return enter(thing.shape, thing.half, turn @ (origin - self.centres[k]), turn @ directions)


def first_hits(placed: Placed, origin: Array, directions: Array, *, alone: bool) -> tuple[Array, Array, Array | None]:
    """What each ray meets first.

    Args:
        placed: The scene.
        origin: Of all rays, [3], inside the room and outside of the objects.
        directions: [3, N], of any length.
        alone: Whether to tell for each object which rays would meet it if it were alone.

    Returns:
        Distances [N] in multiples of the directions, owners [N] (see `Placed`), and the rays that meet each object
        [K, N] or None.
    """
    count = directions.shape[1]
    full = np.zeros((len(placed.scene.objects), count), dtype=bool) if alone else None
    if placed.scene.room is None:
        distance, owner = np.full(count, np.inf), np.full(count, placed.void)
    else:
        distance, side = _leave_room(placed.scene.room, origin, directions)
        owner = side + len(placed.scene.objects)
    for k, rays in enumerate(placed.candidates(origin, directions)):
        found = placed.enter(k, origin, directions[:, rays])
        if full is not None:
            full[k, rays] = found < np.inf
        closer = found < distance[rays]
        rays = rays[closer]
        distance[rays] = found[closer]
        owner[rays] = k
    return distance, owner, full


def blocked(placed: Placed, origin: Array, directions: Array) -> Array:
    """Whether an object stands between the origin [3] and its sum with each direction [3, N]: [N]."""
    hidden = np.zeros(directions.shape[1], dtype=bool)
    for k, rays in enumerate(placed.candidates(origin, directions)):
        # The margin keeps a surface from hiding itself.
        hidden[rays] |= placed.enter(k, origin, directions[:, rays]) < 1 - 1e-6
    return hidden


def check_place(placed: Placed, camera: Camera) -> None:
    """Raise a ValueError if a camera is inside an object or outside of the room."""
    place, room = camera.position, placed.scene.room
    if room is not None and not room.holds(place):
        raise ValueError(f"the camera at {place} is outside of the room of size {room.size} around the origin")
    for k, thing in enumerate(placed.scene.objects):
        if contains(thing.shape, thing.half, placed.rotations[k].T @ (np.array(place) - placed.centres[k])):
            raise ValueError(f"the camera at {place} is inside object {k}, a {thing.name}, at {placed.centres[k]}")


def _leave_room(room: Room, origin: Array, directions: Array) -> tuple[Array, Array]:
    """Distances [N] at which rays that start inside reach the sides, and which side [N]."""
    half, start = np.array(room.size) / 2, origin - room.centre
    distance, side = np.full(directions.shape[1], np.inf), np.zeros(directions.shape[1], dtype=np.int64)
    with np.errstate(divide="ignore"):
        for axis in range(3):
            d = directions[axis]
            positive = d > 0
            far = np.where(positive, half[axis] - start[axis], -half[axis] - start[axis]) / d
            far[d == 0] = np.inf
            nearer = far < distance
            np.copyto(distance, far, where=nearer)
            np.copyto(side, positive + 2 * axis, where=nearer)
    return distance, side

"""Random scenes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from eff_embedded.scenes.config import SceneConfig
from eff_embedded.scenes.geometry import Array
from eff_embedded.scenes.kinds import KINDS
from eff_embedded.scenes.rooms import random_room
from eff_embedded.scenes.scene import Light, Room, Scene, SceneObject

_GAP = 0.04  # metres that are left free between objects, walls and cameras
_TRIES = 60


def make_scene(config: SceneConfig | None = None, *, seed: int) -> Scene:
    """A random room with objects that neither touch nor leave it from time 0 to ``config.duration``.

    The same settings and seed give the same scene. Where the room is full before all objects are placed, it holds
    fewer, though never fewer than asked for.

    Args:
        config: Default: `SceneConfig()`.
        seed: Any whole number from 0 up.

    Raises:
        ValueError: the fewest objects that the settings ask for found no place.
    """
    config = config or SceneConfig()
    rng = np.random.default_rng(seed)
    for _ in range(20):
        room = random_room(config, rng)
        wanted = int(rng.integers(config.num_objects[0], config.num_objects[1] + 1))
        objects: list[SceneObject] = []
        for _ in range(wanted):
            thing = _place(config, room, objects, rng)
            if thing is None:
                break
            objects.append(thing)
        if len(objects) >= config.num_objects[0]:
            return Scene(objects=tuple(objects), room=room, light=_light(config, room, objects, rng))
    raise ValueError(
        f"num_objects={config.num_objects} could not be placed in 20 rooms; use fewer, a larger room, or less motion"
    )


def _place(config: SceneConfig, room: Room, others: list[SceneObject], rng: np.random.Generator) -> SceneObject | None:
    """A random object that is free of the others at all times, or None if none was found."""
    for _ in range(_TRIES):
        thing = _somewhere(config, _thing(config, rng), room, rng)
        if thing is not None and all(_apart(thing, other, config.duration) for other in others):
            return thing
    return None


def _thing(config: SceneConfig, rng: np.random.Generator) -> SceneObject:
    """A random object with its turn and motion, on the floor or floating, in the middle of the room."""
    name = list(KINDS)[int(rng.integers(len(KINDS)))]
    kind = KINDS[name]
    look, size = kind.look(rng, config.styles), kind.size(rng)
    floats = bool(rng.random() < config.floating) and kind.may_float
    speed, spin, turn = rng.uniform(*config.speed), math.radians(rng.uniform(*config.spin)), rng.uniform(0.0, math.pi)
    way, axis, spin_axis = _direction(rng), _direction(rng), _direction(rng)
    if not floats:
        way = np.array([way[0], 0.0, way[2]]) / max(math.hypot(way[0], way[2]), 1e-6)
        axis, spin_axis = (np.array([0.0, math.copysign(1.0, a[1]), 0.0]) for a in (axis, spin_axis))
    return SceneObject(
        name=name,
        shape=kind.shape,
        size=size,
        centre=(0.0, -1.0 if floats else -size[1] / 2, 0.0),
        rotation=_vec(axis * turn),
        velocity=_vec(way * speed),
        spin=_vec(spin_axis * spin),
        texture=look.texture,
        colour=look.colour,
    )


def _somewhere(config: SceneConfig, thing: SceneObject, room: Room, rng: np.random.Generator) -> SceneObject | None:
    """The object at a random place where it stays in the room, or None if it moves too far for that."""
    upright = _upright(thing)
    wide = _half_width(thing) if upright else thing.radius
    reach = np.array([wide, float(thing.half[1]) if upright else thing.radius, wide]) + _GAP
    travel = np.array(thing.velocity) * config.duration
    width, height, depth = room.size
    lowest, highest = np.array([-width / 2, -height, -depth / 2]) + reach, np.array([width / 2, 0, depth / 2]) - reach
    # The middle of the room is for objects, the border for cameras.
    inner = np.array([config.spread / 2 * width, height, config.spread / 2 * depth])
    low, high = np.maximum(lowest, lowest - travel), np.minimum(highest, highest - travel)
    low, high = np.maximum(low, -inner), np.minimum(high, inner)
    if (low >= high).any():
        return None
    x, y, z = rng.uniform(low, high).tolist()
    standing = thing.centre[1] == -thing.size[1] / 2 and upright
    return dataclasses.replace(thing, centre=(x, thing.centre[1] if standing else y, z))


def _half_width(thing: SceneObject) -> float:
    """Radius of the standing cylinder around an upright object."""
    half = thing.half
    return float(math.hypot(half[0], half[2]) if thing.shape == "box" else half[0])


def _upright(thing: SceneObject) -> bool:
    """Whether it stays upright, so that a standing cylinder around it holds it at all times."""
    return all(v[0] == 0 and v[2] == 0 for v in (thing.rotation, thing.spin))


def _apart(a: SceneObject, b: SceneObject, duration: float) -> bool:
    """Whether two objects keep a gap from time 0 to ``duration``; may say no where they just do."""
    offset, drift = np.array(a.centre) - b.centre, np.array(a.velocity) - b.velocity
    if _nearest(offset, drift, duration) >= a.radius + b.radius + _GAP:
        return True
    if not (_upright(a) and _upright(b)):
        return False
    flat = np.array([1.0, 0.0, 1.0])
    beside = _nearest(offset * flat, drift * flat, duration) >= _half_width(a) + _half_width(b) + _GAP
    return bool(beside)


def _nearest(offset: Array, drift: Array, duration: float) -> float:
    """Least length of ``offset + t * drift`` for t from 0 to ``duration``."""
    square = float(drift @ drift)
    t = 0.0 if square == 0 else min(max(-float(offset @ drift) / square, 0.0), duration)
    return float(np.linalg.norm(offset + t * drift))


def _light(config: SceneConfig, room: Room, objects: Sequence[SceneObject], rng: np.random.Generator) -> Light:
    """A lamp below the ceiling, free of the objects at all times."""
    ambient = float(rng.uniform(*config.ambient))
    for height in (0.93, 0.97, 0.99):
        for _ in range(_TRIES):
            x, z = (float(rng.uniform(-0.3, 0.3)) * side for side in (room.size[0], room.size[2]))
            place = np.array([x, -height * room.size[1], z])
            if free_of(objects, place, config.duration, _GAP):
                return Light(position=_vec(place), ambient=ambient, shadows=config.shadows)
    return Light(position=(0.0, -0.999 * room.size[1], 0.0), ambient=ambient, shadows=config.shadows)


def free_of(objects: Sequence[SceneObject], place: Array, duration: float, gap: float) -> bool:
    """Whether a place keeps a gap to the balls around all objects from time 0 to ``duration``."""
    return all(_nearest(np.array(o.centre) - place, np.array(o.velocity), duration) >= o.radius + gap for o in objects)


def _direction(rng: np.random.Generator) -> Array:
    """A direction that is equally likely in each part of the sphere."""
    v = rng.normal(size=3)
    return v / np.linalg.norm(v)


def _vec(v: Array) -> tuple[float, float, float]:
    x, y, z = (float(c) for c in v)
    return (x, y, z)

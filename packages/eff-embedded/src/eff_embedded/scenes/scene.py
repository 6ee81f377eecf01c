"""What a scene is made of: a room, solids that may move, and a light. Conventions: `eff_embedded.scenes`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eff_embedded.scenes.geometry import Array, Vec3, rotation_from_vector
from eff_embedded.scenes.shapes import Shape, contains
from eff_embedded.scenes.textures import Texture
from eff_embedded.scenes.vocabulary import CLASSES

_FORMAT = 1
SIDES = ("left", "right", "ceiling", "floor", "back", "front")
"""Sides of a room in the order of `Room.textures`: at -x, +x, -y, +y, -z, +z."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneObject:
    """A solid with a name, a look and a motion.

    Attributes:
        name: What it is; one of `CLASSES` behind "floor", "wall" and "ceiling".
        shape: "sphere", "box" or "cylinder"; a cylinder stands along its own y.
        size: Full lengths along its own x, y and z in metres. Equal for a sphere; x and z equal for a cylinder.
        centre: Place of its middle at time 0.
        rotation: Its turn at time 0: an axis whose length is the angle in radians.
        velocity: Metres per second.
        spin: Turning in radians per second, about an axis of the world through the middle.
        texture: Its look.
        colour: Word for the colour, for captions.
    """

    name: str
    shape: Shape
    size: Vec3
    centre: Vec3
    rotation: Vec3 = (0.0, 0.0, 0.0)
    velocity: Vec3 = (0.0, 0.0, 0.0)
    spin: Vec3 = (0.0, 0.0, 0.0)
    texture: Texture = field(default_factory=Texture)
    colour: str = ""

    def __post_init__(self) -> None:
        if self.name not in CLASSES[3:]:
            raise ValueError(f"name={self.name!r}; names of objects are {CLASSES[3:]}")
        if self.shape not in ("sphere", "box", "cylinder"):
            raise ValueError(f"shape={self.shape!r}; use 'sphere', 'box' or 'cylinder'")
        if not all(s > 0 for s in self.size):
            raise ValueError(f"size={self.size}; lengths must be positive")
        equal = {"sphere": (0, 1, 2), "cylinder": (0, 2), "box": (0,)}[self.shape]
        if len({self.size[i] for i in equal}) > 1:
            raise ValueError(
                f"size={self.size} of a {self.shape}; lengths along {['xyz'[i] for i in equal]} must agree"
            )

    @property
    def half(self) -> Array:
        """Half lengths, [3]."""
        return np.array(self.size) / 2

    @property
    def radius(self) -> float:
        """Of the smallest ball around the middle that holds it, in metres."""
        half = self.half
        if self.shape == "sphere":
            return float(half[0])
        return float(np.hypot(half[0], half[1]) if self.shape == "cylinder" else np.linalg.norm(half))

    def pose(self, time: float) -> tuple[Array, Array]:
        """Rotation [3, 3] from the frame of the object to the world, and its middle [3], at a time in seconds."""
        turned = rotation_from_vector(np.array(self.spin) * time) @ rotation_from_vector(self.rotation)
        return turned, np.array(self.centre) + time * np.array(self.velocity)

    def holds(self, point: Vec3 | Array, time: float = 0.0) -> bool:
        """Whether a point of the world is in the object or on its surface."""
        rotation, centre = self.pose(time)
        return contains(self.shape, self.half, rotation.T @ (np.asarray(point) - centre))

    def describe(self) -> str:
        """Such as "red ball" or "block with a dog"."""
        if self.texture.kind in ("sprite", "photograph"):
            return f"{self.name} with a picture of {self.texture.image.replace('_', ' ')}"
        return f"{self.colour} {self.name}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The inside of a box: the floor is at y = 0, the ceiling at y = -height, the middle of the floor is the origin.

    Attributes:
        size: Width along x, height, and depth along z, in metres.
        textures: One for each of `SIDES`.
    """

    size: Vec3
    textures: tuple[Texture, Texture, Texture, Texture, Texture, Texture]

    def __post_init__(self) -> None:
        if not all(s > 0 for s in self.size):
            raise ValueError(f"size={self.size}; lengths must be positive")
        if len(self.textures) != 6:
            raise ValueError(f"{len(self.textures)} textures; a room has one for each of {SIDES}")

    @property
    def centre(self) -> Array:
        """The middle of the room, [3]."""
        return np.array([0.0, -self.size[1] / 2, 0.0])

    def holds(self, point: Vec3 | Array) -> bool:
        """Whether a point is inside."""
        return bool((np.abs(np.asarray(point) - self.centre) < np.array(self.size) / 2).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class Light:
    """A point that shines equally in all directions, and a part that comes from everywhere.

    A surface has its colour times ``ambient + (1 - ambient) * max(0, cosine) / (1 + (distance / reach)**2)``, where the
    second term is absent in shadow (Lambert's law).

    Attributes:
        position: Place in the world.
        ambient: Part that reaches every point alike, 0 to 1.
        reach: Distance in metres at which half of the light is left; infinite for none lost.
        shadows: Whether solids stop the light.
    """

    position: Vec3
    ambient: float = 0.45
    reach: float = float("inf")
    shadows: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.ambient <= 1:
            raise ValueError(f"ambient={self.ambient}; it must be between 0 and 1")
        if not self.reach > 0:
            raise ValueError(f"reach={self.reach}; a distance in metres, above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Solids in a room.

    Attributes:
        objects: In the order of the masks' first axis.
        room: None stands for empty space around the objects.
        light: One lamp.
        background: Colour where a ray meets nothing.
    """

    objects: tuple[SceneObject, ...]
    room: Room | None
    light: Light
    background: Vec3 = (0.0, 0.0, 0.0)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the objects."""
        return tuple(o.name for o in self.objects)

    def to_dict(self) -> dict[str, Any]:
        """The scene as JSON can hold it."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scene:
        """The inverse of `to_dict`.

        Raises:
            ValueError: the format is another.
            TypeError: a key is missing or unknown.
        """
        values = dict(values)
        if (seen := values.pop("format", None)) != _FORMAT:
            raise ValueError(f"the scene has format {seen}; this version reads {_FORMAT}")
        room = values.pop("room")
        if room is not None:
            room = Room(**_tuples(room, without="textures"), textures=tuple(map(_texture, room["textures"])))  # type: ignore[arg-type]
        objects = tuple(
            SceneObject(**_tuples(o, without="texture"), texture=_texture(o["texture"])) for o in values.pop("objects")
        )
        return cls(objects=objects, room=room, light=Light(**_tuples(values.pop("light"))), **_tuples(values))


def _tuples(values: Mapping[str, Any], *, without: str = "") -> dict[str, Any]:
    """The fields with lists, as JSON has them, turned to tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k != without}


def _texture(values: Mapping[str, Any]) -> Texture:
    first, second = values["colours"]
    return Texture(**{**values, "colours": (tuple(first), tuple(second))})

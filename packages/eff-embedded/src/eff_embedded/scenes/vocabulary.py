"""Names of what scenes hold: classes, synonyms, and the groups that classes belong to."""

from __future__ import annotations

GROUPS: dict[str, tuple[str, ...]] = {
    "building": ("floor", "wall", "ceiling", "pillar"),
    "toy": ("ball", "block"),
    "container": ("crate", "parcel", "barrel"),
    "furniture": ("cabinet", "bench", "stool", "screen"),
    "ornament": ("globe",),
}
"""Classes by the group that they belong to."""

CLASSES = (
    "floor",
    "wall",
    "ceiling",
    "ball",
    "globe",
    "crate",
    "parcel",
    "block",
    "cabinet",
    "bench",
    "screen",
    "barrel",
    "stool",
    "pillar",
)
"""Semantic classes; a class map holds places in this tuple."""

VOID = 255
"""In class maps: nothing is there."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "floor": ("ground",),
    "wall": (),
    "ceiling": (),
    "ball": ("sphere", "beach ball"),
    "globe": ("planet",),
    "crate": ("wooden box",),
    "parcel": ("package", "carton"),
    "block": ("cube", "toy block"),
    "cabinet": ("cupboard", "closet"),
    "bench": ("seat",),
    "screen": ("board", "picture"),
    "barrel": ("drum", "cask"),
    "stool": ("pouf", "hassock"),
    "pillar": ("column", "post"),
}
"""Other words for a class."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.22, 0.20),
    "orange": (0.95, 0.56, 0.16),
    "yellow": (0.97, 0.83, 0.27),
    "green": (0.33, 0.67, 0.33),
    "teal": (0.16, 0.62, 0.63),
    "blue": (0.22, 0.43, 0.80),
    "purple": (0.55, 0.33, 0.72),
    "pink": (0.95, 0.57, 0.69),
    "white": (0.94, 0.93, 0.89),
    "grey": (0.55, 0.57, 0.60),
}
"""Words for colours, and their red, green and blue."""

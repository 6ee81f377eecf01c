"""Recipes of the classes of objects: solids, sizes and looks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from eff_embedded.scenes.config import Range, Style
from eff_embedded.scenes.geometry import Vec3
from eff_embedded.scenes.shapes import Shape
from eff_embedded.scenes.textures import Direction, Texture, TextureKind
from eff_embedded.scenes.vocabulary import COLOURS

SPRITES = (
    "dog",
    "cat",
    "elephant",
    "penguin",
    "frog",
    "fish",
    "owl",
    "butterfly",
    "turtle",
    "apple",
    "lemon",
    "strawberry",
    "mushroom",
    "cactus",
    "sunflower",
    "rocket",
    "bike",
    "steam_locomotive",
    "boat",
    "guitar",
    "umbrella",
    "star",
    "house",
    "snowman",
)
PICTURES = ("astronaut", "cat", "coffee", "galaxies", "rocket", "retina", "coins", "moon")
"""Photographs that show things; the others are good as ground."""

WOOD: tuple[Vec3, Vec3] = ((0.72, 0.52, 0.33), (0.60, 0.41, 0.24))
CARDBOARD: tuple[Vec3, Vec3] = ((0.80, 0.66, 0.47), (0.72, 0.57, 0.38))


@dataclass(frozen=True, slots=True)
class Look:
    """A texture and the word for its colour."""

    texture: Texture
    colour: str


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of objects: a solid, ranges of its lengths along x, y and z in metres, and how it looks.

    A range of z of (0, 0) stands for the length along x, one of y for a cube or a ball.
    """

    shape: Shape
    sizes: tuple[Range, Range, Range]
    look: Callable[[np.random.Generator, Sequence[Style]], Look]

    @property
    def may_float(self) -> bool:
        """Whether it is small enough to hang in the air without filling the picture."""
        return max(high for _, high in self.sizes) <= 0.8

    def size(self, rng: np.random.Generator) -> Vec3:
        """Random lengths."""
        x, y, z = (float(rng.uniform(*limits)) for limits in self.sizes)
        return (x, y or x, z or x)


def _pattern(*kinds: TextureKind, period: float, direction: Direction = "right") -> Callable[..., Look]:
    """One of some patterns in a colour of the palette with white, or with its own darker tone."""

    def look(rng: np.random.Generator, styles: Sequence[Style]) -> Look:
        name = list(COLOURS)[int(rng.integers(8))]
        first = COLOURS[name]
        second = COLOURS["white"] if rng.random() < 0.5 else _darker(first)
        kind = kinds[int(rng.integers(len(kinds)))]
        texture = Texture(
            kind=kind,
            colours=(first, second),
            period=period,
            direction=direction,
            seed=int(rng.integers(1 << 30)),
        )
        return Look(texture, name)

    return look


def _fixed(kind: TextureKind, colours: tuple[Vec3, Vec3], *, period: float, colour: str) -> Callable[..., Look]:
    def look(rng: np.random.Generator, styles: Sequence[Style]) -> Look:
        shift = float(rng.uniform(0.85, 1.1))
        first, second = (_scaled(c, shift) for c in colours)
        seed = int(rng.integers(1 << 30))
        return Look(Texture(kind=kind, colours=(first, second), period=period, seed=seed), colour)

    return look


def _picture(*, sprites: bool) -> Callable[..., Look]:
    """A picture on every side where the styles allow one, else a pattern."""
    plain = _pattern("checker", period=0.25)

    def look(rng: np.random.Generator, styles: Sequence[Style]) -> Look:
        wanted: tuple[Style, ...] = ("sprites", "photographs") if sprites else ("photographs", "sprites")
        style = next((s for s in wanted if s in styles), "procedural")
        if style == "procedural":
            return plain(rng, styles)
        name = list(COLOURS)[int(rng.integers(8))]
        pale: Vec3 = tuple(0.55 + 0.45 * c for c in COLOURS[name])  # type: ignore[assignment]
        names = SPRITES if style == "sprites" else PICTURES
        image = names[int(rng.integers(len(names)))]
        kind: TextureKind = "sprite" if style == "sprites" else "photograph"
        return Look(Texture(kind=kind, colours=(pale, pale), image=image), name)

    return look


def _darker(colour: Vec3) -> Vec3:
    return _scaled(colour, 0.62)


def _scaled(colour: Vec3, factor: float) -> Vec3:
    r, g, b = (min(1.0, c * factor) for c in colour)
    return (r, g, b)


_EQUAL = (0.0, 0.0)
KINDS: dict[str, Kind] = {
    "ball": Kind("sphere", ((0.35, 0.65), _EQUAL, _EQUAL), _pattern("stripes", "checker", "plain", period=0.35)),
    "globe": Kind(
        "sphere",
        ((0.45, 0.75), _EQUAL, _EQUAL),
        _fixed("noise", ((0.10, 0.30, 0.62), (0.62, 0.80, 0.42)), period=0.22, colour="blue"),
    ),
    "crate": Kind("box", ((0.45, 0.7), (0.4, 0.65), (0.45, 0.7)), _fixed("stripes", WOOD, period=0.16, colour="brown")),
    "parcel": Kind(
        "box", ((0.4, 0.75), (0.2, 0.4), (0.35, 0.6)), _fixed("gradient", CARDBOARD, period=0.0, colour="brown")
    ),
    "block": Kind("box", ((0.4, 0.65), _EQUAL, _EQUAL), _picture(sprites=True)),
    "cabinet": Kind("box", ((0.6, 0.9), (1.1, 1.6), (0.4, 0.5)), _pattern("gradient", "noise", period=0.5)),
    "bench": Kind("box", ((1.0, 1.4), (0.35, 0.45), (0.35, 0.45)), _pattern("stripes", period=0.2, direction="down")),
    "screen": Kind("box", ((0.8, 1.1), (0.8, 1.1), (0.06, 0.1)), _picture(sprites=False)),
    "barrel": Kind("cylinder", ((0.45, 0.65), (0.55, 0.8), _EQUAL), _pattern("stripes", period=0.3, direction="down")),
    "stool": Kind("cylinder", ((0.4, 0.6), (0.35, 0.5), _EQUAL), _pattern("plain", "checker", period=0.2)),
    "pillar": Kind(
        "cylinder",
        ((0.25, 0.4), (1.4, 2.0), _EQUAL),
        _fixed("noise", ((0.88, 0.86, 0.82), (0.55, 0.53, 0.52)), period=0.4, colour="grey"),
    ),
}
"""How each class of objects is made."""

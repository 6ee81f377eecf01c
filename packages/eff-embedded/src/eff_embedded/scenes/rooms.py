"""Random rooms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eff_embedded.scenes.config import SceneConfig, Style
from eff_embedded.scenes.geometry import Vec3
from eff_embedded.scenes.scene import Room
from eff_embedded.scenes.textures import Texture

_WALLS: tuple[Vec3, ...] = (
    (0.87, 0.82, 0.72),
    (0.72, 0.80, 0.84),
    (0.78, 0.84, 0.74),
    (0.88, 0.77, 0.74),
    (0.80, 0.77, 0.86),
    (0.90, 0.88, 0.84),
)
_FLOORS: tuple[tuple[Vec3, Vec3], ...] = (
    ((0.62, 0.45, 0.30), (0.55, 0.39, 0.25)),
    ((0.82, 0.80, 0.76), (0.50, 0.52, 0.54)),
    ((0.48, 0.54, 0.60), (0.38, 0.43, 0.50)),
    ((0.70, 0.60, 0.48), (0.60, 0.50, 0.38)),
)
# Grey photographs of grounds: the colours of what is dark and what is light in them.
_BRICKS: tuple[tuple[Vec3, Vec3], ...] = (
    ((0.52, 0.26, 0.20), (0.86, 0.78, 0.70)),
    ((0.62, 0.54, 0.44), (0.90, 0.87, 0.82)),
    ((0.42, 0.44, 0.48), (0.80, 0.80, 0.78)),
)
_GROUNDS: tuple[tuple[str, tuple[Vec3, Vec3]], ...] = (
    ("grass", ((0.16, 0.34, 0.12), (0.62, 0.74, 0.36))),
    ("gravel", ((0.36, 0.33, 0.30), (0.82, 0.79, 0.74))),
)
_CEILING: tuple[Vec3, Vec3] = ((0.95, 0.94, 0.92), (0.88, 0.87, 0.85))


def random_room(config: SceneConfig, rng: np.random.Generator) -> Room:
    """A room whose four walls share a look."""
    width, height, depth = (
        float(rng.uniform(*limits)) for limits in (config.room_width, config.room_height, config.room_depth)
    )
    wall, floor = _wall(rng, config.styles), _floor(rng, config.styles)
    ceiling = Texture(kind="noise", colours=_CEILING, period=0.8, seed=int(rng.integers(1 << 30)))
    return Room(size=(width, height, depth), textures=(wall, wall, ceiling, floor, wall, wall))


def _wall(rng: np.random.Generator, styles: Sequence[Style]) -> Texture:
    seed, choice = int(rng.integers(1 << 30)), rng.random()
    first = _WALLS[int(rng.integers(len(_WALLS)))]
    r, g, b = (0.9 * c for c in first)
    if "photographs" in styles and choice < 0.4:
        return Texture(kind="photograph", image="brick", colours=_BRICKS[seed % 3], period=float(rng.uniform(1.2, 1.8)))
    if choice < 0.65:
        return Texture(kind="stripes", colours=(first, (r, g, b)), period=float(rng.uniform(0.4, 0.8)))
    if choice < 0.85:
        return Texture(kind="gradient", colours=(first, (r, g, b)))
    return Texture(kind="noise", colours=(first, (0.9 * r, 0.9 * g, 0.9 * b)), period=0.7, seed=seed)


def _floor(rng: np.random.Generator, styles: Sequence[Style]) -> Texture:
    seed, choice = int(rng.integers(1 << 30)), rng.random()
    colours = _FLOORS[int(rng.integers(len(_FLOORS)))]
    if "photographs" in styles and choice < 0.4:
        image, colours = _GROUNDS[seed % 2]
        return Texture(kind="photograph", image=image, colours=colours, period=float(rng.uniform(1.2, 2.0)))
    if choice < 0.6:
        return Texture(kind="checker", colours=colours, period=float(rng.uniform(0.7, 1.1)))
    if choice < 0.85:
        return Texture(kind="stripes", colours=colours, period=float(rng.uniform(0.3, 0.5)), direction="right")
    return Texture(kind="noise", colours=colours, period=0.5, seed=seed)

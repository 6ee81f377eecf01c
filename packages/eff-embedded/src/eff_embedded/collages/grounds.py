"""Grounds on which the objects lie: one colour, two colours that run into each other, or a photograph."""

from __future__ import annotations

import colorsys
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from eff_embedded.collages.dice import Dice

Rgb = tuple[int, int, int]
_SLOPES = tuple((x, y) for x in range(-2, 3) for y in range(-2, 3) if (x, y) != (0, 0))
# Photographs inside scikit-image's wheel that serve as a ground: surfaces without objects of the vocabulary.
PHOTOGRAPHS = ("brick.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "ihc.png")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """What lies behind all objects.

    Attributes:
        kind: "plain" uses ``first`` alone, "graded" runs from ``first`` to ``second``, "photograph" shows
            ``photograph``, softened and tinted by ``first`` so that objects stand out.
        first: Red, green, blue, 0 to 255.
        second: The other colour of a graded ground.
        slope: Direction (right, down) in which a graded ground changes.
        photograph: File name in scikit-image's data.
        crop: Left, top and side of the square cut, as fractions of the photograph's shorter side.
    """

    kind: Literal["plain", "graded", "photograph"]
    first: Rgb
    second: Rgb = (0, 0, 0)
    slope: tuple[int, int] = (0, 1)
    photograph: str = ""
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)


def _soft_colour(dice: Dice) -> Rgb:
    """Neither as vivid as the drawings nor near their black and white."""
    red, green, blue = colorsys.hsv_to_rgb(dice.fraction(), dice.uniform(0.15, 0.5), dice.uniform(0.55, 0.9))
    return round(red * 255), round(green * 255), round(blue * 255)


def sample_ground(dice: Dice, kinds: Sequence[Any]) -> Ground:
    """Draw a ground of one of these kinds."""
    kind = dice.choice(kinds)
    first, second = _soft_colour(dice), _soft_colour(dice)
    if kind == "plain":
        return Ground(kind=kind, first=first)
    if kind == "graded":
        return Ground(kind=kind, first=first, second=second, slope=dice.choice(_SLOPES))
    side = dice.uniform(0.4, 0.9)
    crop = (dice.uniform(0, 1 - side), dice.uniform(0, 1 - side), side)
    return Ground(kind=kind, first=first, photograph=dice.choice(PHOTOGRAPHS), crop=crop)


def paint(ground: Ground, size: int) -> npt.NDArray[np.uint8]:
    """The ground as a picture, uint8 [size, size, 3]; integer arithmetic, hence the same on every machine.

    Raises:
        ModuleNotFoundError: the ground is a photograph and scikit-image is missing.
    """
    if ground.kind == "plain":
        return np.full((size, size, 3), ground.first, np.uint8)
    if ground.kind == "graded":
        right, down = ground.slope
        steps = np.arange(size) * right + (np.arange(size) * down)[:, None]
        steps -= steps.min()
        last = int(steps.max())
        at = np.arange(last + 1)[:, None]
        table = ((last - at) * np.array(ground.first) + at * np.array(ground.second) + last // 2) // last
        return table.astype(np.uint8).take(steps, axis=0)
    image = _photograph(ground.photograph)
    short = min(image.size)
    left, top, side = (round(f * short) for f in ground.crop)
    cut = image.resize((size, size), Image.Resampling.BOX, (left, top, left + max(side, 1), top + max(side, 1)))
    return ((np.asarray(cut, np.uint16) + np.array(ground.first, np.uint16)) // 2).astype(np.uint8)


@lru_cache(maxsize=len(PHOTOGRAPHS))
def _photograph(name: str) -> Image.Image:
    spec = importlib.util.find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "photographs come from scikit-image; install it with: pip install 'eff-embedded[photographs]'",
            name="skimage",
        )
    with Image.open(Path(spec.submodule_search_locations[0]) / "data" / name) as file:
        return file.convert("RGB")

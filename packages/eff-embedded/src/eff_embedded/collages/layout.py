"""Where everything on a collage lies: drawn from a seed, small, and enough to paint the picture again."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from eff_embedded.collages.config import CollageConfig, Style
from eff_embedded.collages.dice import Dice, seed_of
from eff_embedded.collages.grounds import Ground, sample_ground
from eff_embedded.collages.sprites import Sprite, sprite
from eff_embedded.collages.vocabulary import things

_TRIES = 24
_LEAST_OVERLAP = 0.08  # of the smaller object; less would not be seen as "in front of"


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """An object on a collage.

    Attributes:
        name: A name of the vocabulary.
        x: Left edge of its drawing in pixels.
        y: Upper edge in pixels.
        size: Longer side of the drawing in pixels.
        mirrored: Whether it is mirrored left to right.
    """

    name: str
    x: int
    y: int
    size: int
    mirrored: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """A collage before it is painted.

    Attributes:
        size: Height and width in pixels.
        ground: What lies behind.
        objects: From the back to the front; must lie inside the picture.
        seed: Seed of captions and questions where none is given.
        style: Drawings to use.
    """

    size: int
    ground: Ground
    objects: tuple[Placed, ...]
    seed: int = 0
    style: Style = "twemoji"


def sample_layout(seed: Any, config: CollageConfig | None = None) -> Layout:
    """Draw a layout.

    Args:
        seed: An integer, or a generator of numpy, torch or random from which one is drawn.
        config: What to draw.
    """
    config = config or CollageConfig()
    number = seed_of(seed)
    dice = Dice(number, "collage")
    names = _names(dice, config)
    objects = _place(dice, config, names)
    ground = sample_ground(dice, config.grounds)
    return Layout(size=config.size, ground=ground, objects=objects, seed=number, style=config.style)


def _names(dice: Dice, config: CollageConfig) -> list[str]:
    """Which objects: first ones at random, each with the chance to bring its partner."""
    known = config.vocabulary or tuple(things())
    partner = {a: (b, p) for first, second, p in config.pairs for a, b in ((first, second), (second, first))}
    count = dice.between(*config.objects)
    names: list[str] = []
    while len(names) < count:
        free = [
            n for n in known if n not in names and not (config.contrary and n in partner and partner[n][0] in names)
        ]
        if names and (not free or dice.chance(config.repeat)):
            names.append(dice.choice(names))
            continue
        name = dice.choice(free)
        other, probability = partner.get(name, ("", 0.0))
        names.append(name)
        brings = not config.contrary and other in known and other not in names and len(names) < count
        if brings and dice.chance(probability):
            names.append(other)
    return dice.shuffled(names)


def _place(dice: Dice, config: CollageConfig, names: list[str]) -> tuple[Placed, ...]:
    low, high = (f * config.size * min(1.0, 2 / sqrt(len(names))) for f in config.object_size)
    while True:
        board = _Board(dice, config)
        if all(board.add(name, 2 * round(dice.uniform(low, high) / 2)) for name in names):
            return tuple(board.objects)
        low, high = max(4.0, low * 0.85), max(4.0, high * 0.85)  # no room: start again with smaller ones


class _Board:
    """Objects placed so far, with the number of each pixel's front object, so that what is hidden is known exactly."""

    def __init__(self, dice: Dice, config: CollageConfig) -> None:
        self.dice, self.config = dice, config
        self.objects: list[Placed] = []
        self.sprites: list[Sprite] = []
        self.front = np.zeros((config.size, config.size), np.uint8)
        self.may_hide = np.zeros(1)  # pixels that may still be hidden, by object; index 0 is the ground

    def add(self, name: str, size: int) -> bool:
        """Put an object in front of all others; False where no place was found."""
        mirrored = self.dice.chance(self.config.mirror)
        self.drawing = sprite(name, size, mirrored=mirrored, style=self.config.style)
        place = None
        if self.objects and self.dice.chance(self.config.overlap):
            place = self._overlapping()
        place = place or self._apart() or self._anywhere()
        if place is None:
            return False
        x, y = place
        self.may_hide -= self._hidden(x, y)
        self.objects.append(Placed(name=name, x=x, y=y, size=size, mirrored=mirrored))
        self.sprites.append(self.drawing)
        self.may_hide = np.append(self.may_hide, int(self.config.most_hidden * self.drawing.area))
        self._under(x, y)[self.drawing.mask] = len(self.objects)
        return True

    def _under(self, x: int, y: int) -> Any:
        height, width = self.drawing.mask.shape
        return self.front[y : y + height, x : x + width]

    def _hidden(self, x: int, y: int) -> Any:
        """Pixels of each object that the new one would hide at this place."""
        counts = np.bincount(self._under(x, y)[self.drawing.mask], minlength=len(self.objects) + 1)
        counts[0] = 0
        return counts

    def _fits(self, x: int, y: int) -> bool:
        return bool((self._hidden(x, y) <= self.may_hide).all())

    def _room(self) -> tuple[int, int]:
        height, width = self.drawing.mask.shape
        return self.config.size - width, self.config.size - height

    def _overlapping(self) -> tuple[int, int] | None:
        right, down = self._room()
        index = self.dice.between(0, len(self.objects) - 1)
        height, width = self.sprites[index].mask.shape
        mine_high, mine_wide = self.drawing.mask.shape
        target = self.objects[index]
        least = _LEAST_OVERLAP * min(self.drawing.area, self.sprites[index].area)
        for _ in range(_TRIES):
            x = min(max(target.x + int(self.dice.uniform(-0.9 * mine_wide, 0.9 * width)), 0), right)
            y = min(max(target.y + int(self.dice.uniform(-0.9 * mine_high, 0.9 * height)), 0), down)
            if self._hidden(x, y)[index + 1] >= least and self._fits(x, y):
                return x, y
        return None

    def _apart(self) -> tuple[int, int] | None:
        right, down = self._room()
        high, wide = self.drawing.mask.shape
        taken = zip(self.objects, (s.mask.shape for s in self.sprites), strict=True)
        boxes = [(o.x, o.y, o.x + shape[1], o.y + shape[0]) for o, shape in taken]
        for _ in range(_TRIES):
            x, y = self.dice.between(0, right), self.dice.between(0, down)
            if all(x + wide <= x0 or x >= x1 or y + high <= y0 or y >= y1 for x0, y0, x1, y1 in boxes):
                return x, y
        return None

    def _anywhere(self) -> tuple[int, int] | None:
        right, down = self._room()
        for _ in range(_TRIES):
            x, y = self.dice.between(0, right), self.dice.between(0, down)
            if self._fits(x, y):
                return x, y
        return None

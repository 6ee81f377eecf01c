"""What collage diffusion knows: its objects, its grounds, and pictures with the prompts that describe them."""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

from eff_embedded.collages import Collage, CollageConfig, Ground, Layout, Placed, render, sample_layout
from eff_embedded.collages.dice import Dice, seed_of
from eff_embedded.collages.sprites import sprite

OBJECTS = (
    *("dog", "cat", "panda", "lion", "pig", "fox", "frog", "turtle", "octopus", "butterfly", "penguin", "owl"),
    *("apple", "banana", "watermelon", "strawberry", "carrot", "mushroom", "hamburger"),
    *("car", "bus", "airplane", "rocket", "sailboat"),
    *("house", "tree", "cactus", "sunflower", "umbrella", "guitar", "crown", "star", "snowman", "robot", "heart"),
    "basketball",
)
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (240, 240, 240),
    "gray": (164, 166, 172),
    "black": (42, 42, 50),
    "yellow": (250, 230, 150),
    "pink": (250, 200, 214),
    "purple": (204, 182, 236),
    "blue": (160, 204, 246),
    "green": (172, 224, 172),
    "brown": (196, 164, 132),
    "dark blue": (48, 72, 124),
}
GRID = 16  # points; a token of the transformer
SIZES = {1: (64,), 2: (48, 64), 3: (48,)}  # sides of the squares that objects fill, by how many there are
_SIDE = 128
_OVERLAP = 0.1
_LIGHTER = (0.0, 0.0, 0.35, -0.25)  # a ground is plain, plain, or runs to a lighter or a darker tone
_JITTER = 8  # steps of 255
_SLOPES = ((0, 1), (0, -1), (1, 0), (1, 1))


class Example(NamedTuple):
    """A picture and a prompt that describes it."""

    collage: Collage
    prompt: str


def example(seed: Any, *, grid: bool = True) -> Example:
    """Draw a picture of one to three objects and its prompt; the same seed gives the same everywhere.

    Each object fills a square of 48 or 64 points that lies on a grid of 16 points, so that a small model can learn it
    well. One picture in ten of several objects has one in front of another, all others keep them apart.
    Half of the pictures hold two objects. Three prompts in four about several objects state a relation, and every
    second prompt names the ground: "A dog is left of an apple on a blue background." Every other one is written as
    people type, without capital and full stop.

    Args:
        seed: An integer, or a generator of numpy, torch or random from which one is drawn.
        grid: Whether objects keep to the grid; without, they lie anywhere in any size, as for the judge and the
            autoencoder.
    """
    number = seed_of(seed)
    dice = Dice(number, "diffusion")
    count = dice.choice((1, 2, 2, 3))
    name = dice.choice(tuple(GROUNDS))
    objects = _place(count, dice) if grid else sample_layout(number, free_settings(count)).objects
    collage = render(Layout(size=_SIDE, ground=_ground(name, dice), objects=objects, seed=number))
    text = collage.caption(relation=dice.chance(0.75), synonyms=0.1).text
    if dice.chance(0.5):
        text = f"{text.removesuffix('.')} on a {name} background."
    if dice.chance(0.5):
        text = f"{text[0].lower()}{text[1:].removesuffix('.')}"
    return Example(collage, text)


def free_settings(objects: int) -> CollageConfig:
    """Collages with one, two or three objects anywhere."""
    return CollageConfig(
        objects=(objects, objects),
        object_size={1: (0.4, 0.7), 2: (0.34, 0.5), 3: (0.3, 0.4)}[objects],
        overlap=0.1,
        repeat=0.0,
        mirror=0.0,
        vocabulary=OBJECTS,
    )


def _place(count: int, dice: Dice) -> tuple[Placed, ...]:
    """Objects in the middle of squares on the grid."""
    names = dice.shuffled(OBJECTS)[:count]
    overlap = dice.chance(_OVERLAP)
    while True:
        squares = [_square(dice.choice(SIZES[count]), dice) for _ in names]
        if any(_touch(a, b) for a, b in combinations(squares, 2)) == (overlap and count > 1):
            break
    placed = []
    for name, (x, y, side) in zip(names, squares, strict=True):
        high, wide = sprite(name, side).mask.shape
        placed.append(Placed(name=name, x=x + (side - wide) // 2, y=y + (side - high) // 2, size=side))
    return tuple(placed)


def _square(side: int, dice: Dice) -> tuple[int, int, int]:
    last = (_SIDE - side) // GRID
    return GRID * dice.between(0, last), GRID * dice.between(0, last), side


def _touch(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    return all(a[i] < b[i] + b[2] and b[i] < a[i] + a[2] for i in (0, 1))


def _ground(name: str, dice: Dice) -> Ground:
    red, green, blue = (min(max(c + dice.between(-_JITTER, _JITTER), 0), 255) for c in GROUNDS[name])
    change = dice.choice(_LIGHTER)
    if not change:
        return Ground(kind="plain", first=(red, green, blue))
    goal = 255 if change > 0 else 0
    lighter = [round(c + (goal - c) * abs(change)) for c in (red, green, blue)]
    second = (lighter[0], lighter[1], lighter[2])
    return Ground(kind="graded", first=(red, green, blue), second=second, slope=dice.choice(_SLOPES))

"""What collage diffusion knows: its objects, its grounds, and pictures with the prompts that describe them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from eff_embedded.collages import Collage, CollageConfig, Ground, render, sample_layout
from eff_embedded.collages.dice import Dice, seed_of

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
_SIZES = {1: (0.4, 0.7), 2: (0.34, 0.5), 3: (0.3, 0.4)}  # longer side, as a fraction of the picture
_LIGHTER = (0.0, 0.0, 0.35, -0.25)  # a ground is plain, plain, or runs to a lighter or a darker tone
_JITTER = 8  # steps of 255


class Example(NamedTuple):
    """A picture and a prompt that describes it."""

    collage: Collage
    prompt: str


def settings(objects: int) -> CollageConfig:
    """Collages with one, two or three objects, in the sizes that the model was trained on."""
    return CollageConfig(
        objects=(objects, objects),
        object_size=_SIZES[objects],
        overlap=0.1,
        repeat=0.0,
        mirror=0.0,
        vocabulary=OBJECTS,
    )


def example(seed: Any) -> Example:
    """Draw a picture of one to three objects and its prompt; the same seed gives the same everywhere.

    Half of the pictures hold two objects. Three prompts in four about several objects state a relation, and every
    second prompt names the ground: "A dog is left of an apple on a blue background." Every other one is written as
    people type, without capital and full stop.
    """
    number = seed_of(seed)
    dice = Dice(number, "diffusion")
    count = dice.choose((1, 2, 2, 3))
    name = dice.choose(tuple(GROUNDS))
    layout = sample_layout(number, settings(count))
    collage = render(dataclasses.replace(layout, ground=_ground(name, dice)))
    text = collage.caption(relation=dice.chance(0.75), synonyms=0.1).text
    if dice.chance(0.5):
        text = f"{text.removesuffix('.')} on a {name} background."
    if dice.chance(0.5):
        text = f"{text[0].lower()}{text[1:].removesuffix('.')}"
    return Example(collage, text)


def _ground(name: str, dice: Dice) -> Ground:
    first = tuple(min(max(c + dice.between(-_JITTER, _JITTER), 0), 255) for c in GROUNDS[name])
    change = dice.choose(_LIGHTER)
    if not change:
        return Ground(kind="plain", first=first)
    goal = 255 if change > 0 else 0
    second = tuple(round(c + (goal - c) * abs(change)) for c in first)
    return Ground(kind="graded", first=first, second=second, slope=dice.choose(((0, 1), (0, -1), (1, 0), (1, 1))))

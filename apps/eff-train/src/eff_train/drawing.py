"""Pictures that recipes show: heat maps over pictures, sheets with captions, simple charts. On Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PALETTE = ((31, 119, 180), (214, 73, 51), (44, 140, 80), (148, 103, 189), (200, 140, 30), (90, 90, 90), (20, 160, 170))
"""Colours of series and paths; they differ in brightness as well."""

# From dark blue over magenta and orange to pale yellow: brightness rises with the value.
_STOPS = torch.tensor([(0, 0, 20), (60, 10, 110), (150, 35, 110), (225, 90, 55), (250, 175, 40), (252, 250, 190)]) / 255


def read_picture(file: object) -> Tensor:
    """A picture file as floats [3, H, W] from 0 to 1.

    Raises:
        ValueError: the file is no picture.
    """
    return from_image(open_picture(file))


def open_picture(file: object, mode: str = "RGB") -> Image.Image:
    """A picture file in a mode of Pillow.

    Raises:
        ValueError: the file is no picture.
    """
    try:
        with Image.open(file) as image:  # type: ignore[arg-type]
            return image.convert(mode)
    except OSError as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error


def from_image(image: Image.Image) -> Tensor:
    """A picture as floats [3, H, W] from 0 to 1."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255


def to_image(picture: Tensor, scale: int = 1) -> Image.Image:
    """Floats [3, H, W] or [1, H, W] from 0 to 1 as a picture, each point ``scale`` points wide."""
    points = (picture.detach().cpu().expand(3, -1, -1).clamp(0, 1) * 255).round().to(torch.uint8)
    image = Image.fromarray(points.movedim(0, -1).contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


def squared(picture: Tensor, side: int) -> Tensor:
    """The middle square of a picture [3, H, W], scaled to [3, side, side]."""
    height, width = picture.shape[1:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    part = picture[None, :, top : top + short, left : left + short]
    return F.interpolate(part, size=(side, side), mode="bilinear", align_corners=False, antialias=True)[0].clamp(0, 1)


def heat(values: Tensor) -> Tensor:
    """Values [H, W] from 0 to 1 as colours [3, H, W]."""
    place = values.detach().cpu().float().clamp(0, 1) * (len(_STOPS) - 1)
    low = place.floor().long().clamp(max=len(_STOPS) - 2)
    return (_STOPS[low] + (place - low)[..., None] * (_STOPS[low + 1] - _STOPS[low])).movedim(-1, 0)


def over(picture: Tensor, values: Tensor, share: float = 0.6) -> Tensor:
    """A heat map [h, w] of any values, stretched to its own range, over a picture [3, H, W]."""
    values = values.detach().cpu().float()
    stretched = (values - values.min()) / (values.max() - values.min()).clamp_min(1e-9)
    large = F.interpolate(stretched[None, None], size=picture.shape[1:], mode="bilinear", align_corners=False)[0, 0]
    grey = picture.detach().cpu().mean(0, keepdim=True)
    return (1 - share) * grey + share * heat(large)


def distinct(count: int) -> Tensor:
    """Colours [count, 3] from 0 to 1 of classes, neighbours far apart."""
    turns = torch.arange(count) * 0.61803
    hue = (turns[:, None] - torch.tensor([0.0, 1 / 3, 2 / 3])) * 2 * torch.pi
    bright = torch.tensor([1.0, 0.72, 0.5])[torch.arange(count) % 3]
    return (0.5 + 0.45 * hue.cos()) * bright[:, None]


def sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), columns: Sequence[str] = (), gap: int = 4
) -> Image.Image:
    """Pictures in rows, with a title left of each row and one above each column."""
    font = ImageFont.load_default(12)
    left = max((round(font.getlength(t)) for t in titles), default=-8) + 8
    wide = [max(r[i].width for r in rows if i < len(r)) for i in range(max(map(len, rows)))]
    if columns:
        wide = [max(w, round(font.getlength(c)) + 2) for w, c in zip(wide, columns, strict=True)]
    top = 16 if columns else 0
    high = [max(image.height for image in row) for row in rows]
    whole = Image.new("RGB", (left + sum(wide) + gap * len(wide), top + sum(high) + gap * len(high)), "white")
    draw = ImageDraw.Draw(whole)
    for i, text in enumerate(columns):
        draw.text((left + sum(wide[:i]) + gap * i, 1), text, "black", font)
    for r, row in enumerate(rows):
        y = top + sum(high[:r]) + gap * r
        if titles:
            draw.text((2, y + high[r] // 2 - 7), titles[r], "black", font)
        for c, image in enumerate(row):
            whole.paste(image, (left + sum(wide[:c]) + gap * c, y))
    return whole


def bars(groups: Mapping[str, Mapping[str, float]], title: str, top: float = 1.0) -> Image.Image:
    """Bars of several series for each group, from 0 to ``top``; what is not a number has no bar."""
    font = ImageFont.load_default(12)
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = max(60, 16 * len(series) + 24, max(round(font.getlength(g)) for g in groups) + 10)
    image = Image.new("RGB", (60 + width * len(groups), 250), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 4), title, "black", font)
    _legend(draw, series, font)
    for i in range(5):
        y = 220 - 170 * i / 4
        draw.line((44, y, image.width - 8, y), (225, 225, 225))
        draw.text((6, y - 7), f"{top * i / 4:.3g}", "black", font)
    for g, (name, values) in enumerate(groups.items()):
        x = 52 + width * g
        draw.text((x, 226), name, "black", font)
        for s, which in enumerate(series):
            value = values.get(which, float("nan"))
            if value > 0:
                high = 170 * min(value / top, 1.0)
                draw.rectangle((x + 16 * s, 220 - high, x + 16 * s + 13, 220), PALETTE[s % len(PALETTE)])
    return image


def lines(series: Mapping[str, Sequence[float]], title: str, *, start: int = 1) -> Image.Image:
    """Lines of series of values, numbered from ``start``, over a common range."""
    font = ImageFont.load_default(12)
    values = [v for line in series.values() for v in line]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    image = Image.new("RGB", (460, 250), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 4), title, "black", font)
    _legend(draw, list(series), font)
    longest = max(map(len, series.values()))
    for i in range(5):
        y = 220 - 170 * i / 4
        draw.line((60, y, 450, y), (225, 225, 225))
        draw.text((4, y - 7), f"{low + span * i / 4:.3g}", "black", font)
    for i in sorted({0, longest // 2, longest - 1}):
        draw.text((60 + 380 * i / max(1, longest - 1), 226), str(start + i), "black", font)
    for s, line in enumerate(series.values()):
        points = [(60 + 380 * i / max(1, longest - 1), 220 - 170 * (v - low) / span) for i, v in enumerate(line)]
        draw.line(points, PALETTE[s % len(PALETTE)], 2)
    return image


def _legend(
    draw: ImageDraw.ImageDraw, names: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    x = 46.0
    for i, name in enumerate(names):
        draw.rectangle((x, 24, x + 10, 34), PALETTE[i % len(PALETTE)])
        draw.text((x + 14, 22), name, "black", font)
        x += 24 + font.getlength(name)

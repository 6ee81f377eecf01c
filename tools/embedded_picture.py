"""Draws docs/images/collages.png and collages_parts.png: what `eff_embedded.collages` makes.

``python tools/embedded_picture.py`` takes a second.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from eff_embedded import collages
from PIL import Image

OUT = Path(__file__).parents[1] / "docs" / "images"
SEEDS = (3, 8, 11, 14, 21, 27, 30, 42)
GAP = 6


def sheet(rows: list[list[np.ndarray]]) -> Image.Image:
    """Pictures of one size side by side and below each other, on white."""
    height, width = rows[0][0].shape[:2]
    size = (len(rows[0]) * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP)
    whole = Image.new("RGB", size, "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            whole.paste(Image.fromarray(picture), (j * (width + GAP), i * (height + GAP)))
    return whole


def tinted(masks: np.ndarray) -> np.ndarray:
    """Each mask in a colour of its own, on dark grey."""
    colours = np.array([[230, 85, 75], [70, 130, 220], [245, 190, 60], [80, 175, 95], [160, 95, 205]], np.uint8)
    out = np.full((*masks.shape[1:], 3), 40, np.uint8)
    for mask, colour in zip(masks, colours, strict=False):
        out[mask] = colour
    return out


def main() -> None:
    """Draw both."""
    config = collages.CollageConfig(objects=(2, 4), grounds=("plain", "graded", "photograph"))
    made = [collages.sample(seed, config) for seed in SEEDS]
    sheet([[c.picture for c in made[:4]], [c.picture for c in made[4:]]]).save(OUT / "collages.png", optimize=True)
    for c in made:
        print(c.caption(0).text)
    c = made[1]
    full = [np.where(m[..., None], c.picture, 40).astype(np.uint8) for m in c.visible[:2]]
    sheet([[c.picture, tinted(c.visible), *full]]).save(OUT / "collages_parts.png", optimize=True)


if __name__ == "__main__":
    main()

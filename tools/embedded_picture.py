"""Draws docs/images/collages.png and collages_parts.png: what `eff_embedded.collages` makes.

``python tools/embedded_picture.py`` takes seconds; it needs the extras sprites, openmoji and photographs.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from eff_embedded import collages
from PIL import Image, ImageDraw, ImageFont

OUT = Path(__file__).parents[1] / "docs" / "images"
SIZE, GAP, LINE, LETTERS = 192, 10, 15, 33
DARK = 45
COLOURS = np.array([[230, 85, 75], [70, 130, 220], [245, 190, 60], [80, 175, 95], [160, 95, 205]], np.uint8)
ROWS = (
    (collages.CollageConfig(size=SIZE, objects=(2, 4)), (2, 7, 12, 23)),
    (collages.CollageConfig(size=SIZE, objects=(3, 6), overlap=0.6, grounds=("photograph",)), (1, 6, 10, 16)),
    (collages.CollageConfig(size=SIZE, objects=(2, 4), style="openmoji"), (24, 47, 51, 56)),
)


def sheet(rows: list[list[tuple[np.ndarray, str]]]) -> Image.Image:
    """Pictures of one size with a text below each, on white."""
    texts = [[textwrap.wrap(text, LETTERS) for _, text in row] for row in rows]
    below = [4 + LINE * max(map(len, row)) for row in texts]
    width = len(rows[0]) * (SIZE + GAP) - GAP
    whole = Image.new("RGB", (width, sum(SIZE + GAP + b for b in below) - GAP), "white")
    draw, font, top = ImageDraw.Draw(whole), ImageFont.load_default(12), 0
    for row, lines, space in zip(rows, texts, below, strict=True):
        for j, ((picture, _), words) in enumerate(zip(row, lines, strict=True)):
            whole.paste(Image.fromarray(picture), (j * (SIZE + GAP), top))
            for i, line in enumerate(words):
                draw.text((j * (SIZE + GAP), top + SIZE + 3 + i * LINE), line, "black", font)
        top += SIZE + GAP + space
    return whole


def tinted(masks: np.ndarray) -> np.ndarray:
    """Each mask in a colour of its own, on dark grey; where several lie, their mean colour."""
    over = np.tensordot(masks.astype(float), COLOURS[: len(masks)].astype(float), (0, 0))
    count = masks.sum(0)[..., None]
    return np.where(count > 0, over / np.maximum(count, 1), DARK).astype(np.uint8)


def alone(collage: collages.Collage, i: int) -> np.ndarray:
    """One layer on dark grey."""
    ground = np.full_like(collage.picture, DARK)
    return collages.composite(ground, collage.layers[i : i + 1])


def main() -> None:
    """Draw both."""
    made = [[collages.sample(seed, config) for seed in seeds] for config, seeds in ROWS]
    sheet([[(c.picture, c.caption().text) for c in row] for row in made]).save(OUT / "collages.png", optimize=True)
    layout = collages.Layout(
        size=SIZE,
        ground=collages.Ground(kind="graded", first=(150, 190, 215), second=(205, 190, 160), slope=(1, 2)),
        objects=(
            collages.Placed(name="castle", x=50, y=12, size=100),
            collages.Placed(name="dragon", x=12, y=66, size=92),
            collages.Placed(name="sheep", x=112, y=98, size=66),
            collages.Placed(name="tree", x=78, y=90, size=84),
        ),
    )
    c = collages.render(layout)
    hidden = max(range(len(c.names)), key=lambda i: c.hidden[i])
    half = f"{c.names[hidden]} alone, {c.hidden[hidden]:.0%} hidden"
    parts = [
        (c.picture, "picture"),
        (tinted(c.visible), "visible masks"),
        (tinted(c.full), "full masks, one over another"),
    ]
    sheet([[*parts, (alone(c, hidden), half)]]).save(OUT / "collages_parts.png", optimize=True)


if __name__ == "__main__":
    main()

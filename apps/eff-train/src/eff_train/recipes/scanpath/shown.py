"""Paths as pictures, and the file that asks for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from eff_train.drawing import PALETTE
from eff_train.recipes.scanpath.scores import Paths


def draw_paths(
    picture: Image.Image, boxes: Sequence[tuple[float, float, float, float]], paths: Paths, target: int
) -> Image.Image:
    """Paths over a picture: numbered circles joined by lines, each path in a colour; a frame about the target."""
    image = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.35)
    draw = ImageDraw.Draw(image)
    draw.rectangle(boxes[target], outline=(0, 0, 0), width=3)
    for k, path in enumerate(paths):
        shift = 9.0 * (k - (len(paths) - 1) / 2)
        points = [((boxes[i][0] + boxes[i][2]) / 2 + shift, (boxes[i][1] + boxes[i][3]) / 2 + shift) for i in path]
        colour = PALETTE[k % len(PALETTE)]
        draw.line(points, colour, 2)
        for n, (x, y) in enumerate(points):
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=colour, outline="white")
            draw.text((x, y), str(n + 1), "white", anchor="mm")
    return image


def read_shelf(file: Path) -> dict[str, Any]:
    """What a JSON file asks for; see `Scanpath.predict`.

    Raises:
        ValueError: it lacks something, or the target is not on the shelf.
    """
    try:
        asked = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    wanted = {"picture": str, "target": int, "rows": int, "columns": int}
    if not isinstance(asked, dict) or any(type(asked.get(k)) is not t for k, t in wanted.items()):
        raise ValueError(f"{file} must hold picture (text), target, rows and columns (whole numbers), got {asked!r}")
    if asked["rows"] < 1 or asked["columns"] < 1 or not 0 <= asked["target"] < asked["rows"] * asked["columns"]:
        raise ValueError(f"{file}: no object {asked['target']} on a shelf of {asked['rows']} x {asked['columns']}")
    return dict(asked)

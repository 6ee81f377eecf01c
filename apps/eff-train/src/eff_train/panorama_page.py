"""A web page in one file in which a person looks around in panoramas."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

from PIL import Image


def write_panorama_page(path: Path, title: str, maps: Mapping[str, Image.Image]) -> None:
    """Write a page that shows panoramas from the inside; it needs no other file and no network.

    Args:
        path: The HTML file.
        title: Shown at the top.
        maps: Equirectangular pictures by the name on their button, all of one panorama; the first is shown first.

    Raises:
        ValueError: there is no picture, or one is not twice as wide as high.
    """
    if not maps:
        raise ValueError("maps is empty; give one panorama or more")
    for name, image in maps.items():
        if image.width != 2 * image.height:
            raise ValueError(f"{name!r} is {image.width} x {image.height}; a panorama is twice as wide as high")
    sources = json.dumps({name: _data_url(image) for name, image in maps.items()}).replace("<", "\\u003c")
    parts = {"title": escape(title), "maps": sources}
    page = files("eff_train").joinpath("panorama_page.html").read_text(encoding="utf-8")
    path.write_text(re.sub(r"{{(title|maps)}}", lambda found: parts[found[1]], page), encoding="utf-8")


def _data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.convert("RGB").save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()

"""Pictures on disk: written whole or not at all, named by nothing that a client says, settings inside."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image, ImageOps, PngImagePlugin

KEY = "eff-studio"
MAX_POINTS = 4096 * 4096
MAX_SETTINGS = 64 * 1024
_ID = re.compile(r"[0-9a-f]{32}")


class Rejected(ValueError):
    """A file that is no picture the studio takes."""


class Pictures:
    """A folder of PNG files.

    Args:
        folder: Made if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)

    def add(self, image: Image.Image, settings: Mapping[str, Any] | None = None) -> str:
        """Store a picture, with its settings inside; returns its id."""
        name = secrets.token_hex(16)
        part = self.folder / f"{name}.part"
        with part.open("wb") as file:
            write_png(image, file, settings)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.folder / f"{name}.png")
        return name

    def path(self, name: str) -> Path | None:
        """The file of an id, or None."""
        if not _ID.fullmatch(name):
            return None
        path = self.folder / f"{name}.png"
        return path if path.is_file() else None

    def open(self, name: str) -> Image.Image:
        """A stored picture.

        Raises:
            ValueError: there is none of this id.
        """
        path = self.path(name)
        if path is None:
            raise ValueError(f"there is no picture {name[:60]!r}")
        with Image.open(path) as image:
            image.load()
            return image.copy()

    def remove(self, name: str) -> None:
        """Delete a picture, if it is there."""
        path = self.path(name)
        if path is not None:
            path.unlink(missing_ok=True)


def write_png(image: Image.Image, file: Path | IO[bytes], settings: Mapping[str, Any] | None = None) -> None:
    """Write a picture with its settings inside, as `read_settings` finds them."""
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        info.add_itxt(KEY, json.dumps(settings))
    image.save(file, format="PNG", pnginfo=info)


def read_picture(data: bytes) -> Image.Image:
    """Decode what a client sent.

    Raises:
        Rejected: it is no PNG, JPEG or WebP, is broken, moves, or has too many points.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            _check_size(image)
            if getattr(image, "n_frames", 1) > 1:
                raise Rejected("the picture moves; send a still one")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGBA" if "A" in upright.getbands() or "transparency" in image.info else "RGB")
    except Rejected:
        raise
    except Exception as error:
        raise Rejected(f"the file is not a complete PNG, JPEG or WebP picture ({type(error).__name__})") from None


def _check_size(image: Image.Image) -> None:
    """Refuse a picture by its header, before its points take memory."""
    if image.width * image.height > MAX_POINTS:
        raise Rejected(f"the picture has {image.width} x {image.height} points; at most {MAX_POINTS} in all")


def read_settings(data: bytes) -> dict[str, Any]:
    """The settings inside of a picture of the studio.

    Raises:
        Rejected: it is no picture, or holds none.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            _check_size(image)
            image.load()
            text = getattr(image, "text", {}).get(KEY, "")
    except Rejected:
        raise
    except Exception as error:
        raise Rejected(f"the file is not a complete PNG picture ({type(error).__name__})") from None
    if not text:
        raise Rejected("the picture was not made by the studio: it holds no settings")
    if len(text) > MAX_SETTINGS:
        raise Rejected(f"the picture's settings have {len(text)} characters; at most {MAX_SETTINGS} are read")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise Rejected("the picture's settings are not JSON") from None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise Rejected("the picture's settings are not those of the studio")
    return found

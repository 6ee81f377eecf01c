"""A picture out of a data URL, with nothing believed: not its type, not its size, not that it is one."""

from __future__ import annotations

import base64
import binascii
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
MAX_PIXELS = 32_000_000
"""Most pixels of a picture: a small file can unfold to gigabytes."""

_HEAD = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[^;,]*)*;base64", re.ASCII | re.IGNORECASE)


class PictureError(ValueError):
    """What was sent as a picture cannot be taken; the message says why."""


def read_picture(url: str, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode the picture in a data URL, turned as its camera says.

    Args:
        url: ``data:image/png;base64,...``; the named type does not matter, the bytes do.
        max_pixels: Most pixels; larger pictures are refused before they are unfolded.

    Raises:
        PictureError: another kind of URL, no base64, no picture, or a damaged or too large one.
    """
    head, comma, data = url.partition(",")
    if not head[:5].lower() == "data:":
        raise PictureError(
            f"pictures must be sent inside the request, as data:image/png;base64,...; this server fetches no address, "
            f"got {url[:60]!r}"
        )
    if not comma or not _HEAD.fullmatch(head):
        raise PictureError(f"a picture's data URL must begin with data:image/...;base64, got {head[:60]!r}")
    try:
        raw = base64.b64decode(re.sub(r"\s+", "", data), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"the picture is not valid base64: {error}") from None
    return _decode(raw, max_pixels)


def _decode(raw: bytes, max_pixels: int) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError(f"the picture has {width} x {height} pixels; the limit is {max_pixels:,}")
        image.load()
        return ImageOps.exif_transpose(image)
    except UnidentifiedImageError:
        raise PictureError(f"the {len(raw)} bytes are not a picture of format {', '.join(FORMATS)}") from None
    except bombs:
        raise PictureError(f"the picture has too many pixels; the limit is {max_pixels:,}") from None
    except PictureError:
        raise
    except Exception as error:  # decoders raise a dozen kinds for damaged files
        raise PictureError(f"the picture is damaged: {error}") from None

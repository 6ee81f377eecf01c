"""One picture that holds the subjects and, beside them, the target with its hole. Works on PIL pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from eff_guidance.context_brush.spans import Box, CanvasSpans

if TYPE_CHECKING:
    from PIL import Image

Background = Literal["white", "gray", "blur"]
_COLOURS = {"white": (255, 255, 255), "gray": (128, 128, 128)}


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What to inpaint, and how to get the result back into the target.

    Attributes:
        image: RGB; the subjects above (or left of) the target.
        mask: L, of the same size: 255 where to paint.
        spans: Places of subjects and target among the picture tokens.
        query_box: The target on the canvas in points: left, top, right, bottom.
        crop_box: The part of the target that is on the canvas, in the target's points.
        target: The whole target, RGB.
        hole: bool [height, width] of the target.
    """

    image: Image.Image
    mask: Image.Image
    spans: CanvasSpans
    query_box: Box
    crop_box: Box
    target: Image.Image
    hole: npt.NDArray[np.bool_]


def build_incontext_canvas(
    subject: Any,
    target: Image.Image,
    hole: Any,
    *,
    subject_mask: Any = None,
    size: int | tuple[int, int] = 768,
    layout: Literal["vertical", "horizontal"] = "vertical",
    background: Background | tuple[int, int, int] = "white",
    crop: float | None = None,
    token: int = 16,
) -> Canvas:
    """Lay out subjects and target, each scaled to one size.

    Args:
        subject: A PIL picture, or several. What is transparent, or outside of its mask, becomes background.
        target: The picture to paint into.
        hole: Where to paint: a PIL picture of the target's size (bright is hole), or bool [height, width].
        subject_mask: As ``hole``, for the subject; a sequence of them (or None) for several subjects.
        size: Side of each part in points, or (height, width).
        layout: "vertical" puts subjects above the target, which keeps its tokens together; "horizontal" left of it.
        background: Behind the subject: a name, a colour, or "blur", a blurred copy of the subject's own picture.
        crop: Take only a box around the hole, this many times its size, so that small holes of large photographs are
            painted at a good size; None takes the whole target.
        token: Points a picture token covers along a side.

    Returns:
        The canvas. The subject keeps its proportions; the target is scaled to the size and scaled back by `stitch`.

    Raises:
        TypeError: a picture is no PIL picture.
        ValueError: sizes are no multiples of a token, a mask has another size than its picture, or the hole is empty.
    """
    from PIL import Image

    high, wide = (size, size) if isinstance(size, int) else size
    if high % token or wide % token or min(high, wide) < token:
        raise ValueError(f"size={size}: height {high} and width {wide} must be multiples of {token} points, one token")
    if layout not in ("vertical", "horizontal"):
        raise ValueError(f"layout={layout!r}; use 'vertical' or 'horizontal'")
    if crop is not None and crop < 1:
        raise ValueError(f"crop={crop}; wanted at least 1, the hole's own box")
    subjects = list(subject) if isinstance(subject, Sequence) else [subject]
    cutouts = list(subject_mask) if isinstance(subject_mask, list | tuple) else [subject_mask] * len(subjects)
    if not subjects or len(cutouts) != len(subjects):
        raise ValueError(f"{len(subjects)} subjects and {len(cutouts)} masks; wanted equal numbers, at least one")
    for picture in (*subjects, target):
        if not isinstance(picture, Image.Image):
            raise TypeError(f"pictures must be PIL pictures, got {type(picture).__name__}")
    where = _mask(hole, target, "hole")
    if not where.any():
        raise ValueError("the hole is empty: nothing would be painted")
    box = (0, 0, *target.size) if crop is None else _around(where, crop)
    photo = target.convert("RGB")
    query = photo.crop(box).resize((wide, high), Image.Resampling.LANCZOS)
    cut = Image.fromarray((255 * where[box[1] : box[3], box[0] : box[2]]).astype(np.uint8))
    painted = np.asarray(cut.resize((wide, high), Image.Resampling.BILINEAR)) > 0
    parts = [_on_ground(s, m, (wide, high), background) for s, m in zip(subjects, cutouts, strict=True)]
    step = (0, high) if layout == "vertical" else (wide, 0)
    count = len(parts)
    image = Image.new("RGB", (wide + count * step[0], high + count * step[1]))
    mask = Image.new("L", image.size)
    for i, part in enumerate([*parts, query]):
        image.paste(part, (i * step[0], i * step[1]))
    left, top = count * step[0], count * step[1]
    mask.paste(Image.fromarray((255 * painted).astype(np.uint8)), (left, top))
    rows, columns = high // token, wide // token
    boxes = [
        (r, c, r + rows, c + columns)
        for r, c in ((i * step[1] // token, i * step[0] // token) for i in range(count + 1))
    ]
    spans = CanvasSpans(grid=(image.height // token, image.width // token), subjects=tuple(boxes[:-1]), query=boxes[-1])
    return Canvas(
        image=image, mask=mask, spans=spans, query_box=(left, top, left + wide, top + high), crop_box=box,
        target=photo, hole=where,
    )  # fmt: skip


def stitch(canvas: Canvas, painted: Image.Image, feather: int = 8) -> Image.Image:
    """The target with a painted canvas's part over the hole.

    Points farther than ``feather`` from the hole keep their values bit for bit; within, the two run into each other.

    Args:
        canvas: The canvas.
        painted: The whole canvas as the model painted it.
        feather: Width of the seam in the target's points; 0 for a hard edge at the hole.

    Raises:
        ValueError: ``painted`` is not of the canvas's size.
    """
    from PIL import Image

    if painted.size != canvas.image.size:
        raise ValueError(f"painted is {painted.size}, the canvas {canvas.image.size}")
    box = canvas.crop_box
    part = painted.convert("RGB").crop(canvas.query_box)
    part = part.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
    alpha = _feathered(canvas.hole, feather)[box[1] : box[3], box[0] : box[2], None]
    old = np.asarray(canvas.target)[box[1] : box[3], box[0] : box[2]]
    mixed = np.rint(alpha * np.asarray(part) + (1 - alpha) * old).astype(np.uint8)
    made = np.array(canvas.target)
    made[box[1] : box[3], box[0] : box[2]] = np.where(alpha > 0, mixed, old)
    return Image.fromarray(made)


def _feathered(hole: npt.NDArray[np.bool_], feather: int) -> npt.NDArray[np.float64]:
    """1 in the hole, falling to 0 over ``feather`` points (counted along rows and columns, as a square)."""
    alpha = hole.astype(np.float64)
    grown = hole
    for i in range(1, feather + 1):
        grown = _dilated(grown)
        alpha = np.where((alpha == 0) & grown, 1 - i / (feather + 1), alpha)
    return alpha


def _dilated(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    wide = np.pad(mask, 1)
    tall = wide[:-2] | wide[1:-1] | wide[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def _mask(mask: Any, picture: Image.Image, name: str) -> npt.NDArray[np.bool_]:
    array = np.asarray(mask.convert("L")) >= 128 if hasattr(mask, "convert") else np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"{name} must be a PIL picture or bool [height, width], got {array.dtype}")
    if array.shape != (picture.height, picture.width):
        raise ValueError(
            f"{name} is {array.shape} (height, width), its picture {(picture.height, picture.width)}; "
            "wanted the same (PIL's size is width first)"
        )
    return array


def _around(hole: npt.NDArray[np.bool_], factor: float) -> Box:
    """Box around the hole, ``factor`` times as large, inside of the picture."""
    ends = []
    for line, length in ((hole.any(0), hole.shape[1]), (hole.any(1), hole.shape[0])):
        places = np.flatnonzero(line)
        first, last = int(places[0]), int(places[-1]) + 1
        more = round((last - first) * (factor - 1) / 2)
        ends.append((max(0, first - more), min(length, last + more)))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def _on_ground(
    subject: Image.Image, mask: Any, size: tuple[int, int], background: Background | tuple[int, int, int]
) -> Image.Image:
    """The cut-out subject in the middle of a ground of this size (width, height)."""
    from PIL import Image, ImageFilter

    cut = subject.convert("RGBA")
    if mask is not None:
        kept = np.array(cut)
        kept[..., 3] = np.where(_mask(mask, subject, "subject_mask"), kept[..., 3], 0)
        cut = Image.fromarray(kept)
    if background == "blur":
        ground = subject.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        ground = ground.filter(ImageFilter.GaussianBlur(max(size) / 16))
    elif isinstance(background, str) and background not in _COLOURS:
        raise ValueError(f"background={background!r}; use one of {[*_COLOURS, 'blur']} or a colour (r, g, b)")
    else:
        ground = Image.new("RGB", size, _COLOURS[background] if isinstance(background, str) else background)
    scale = min(size[0] / cut.width, size[1] / cut.height)
    cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.LANCZOS)
    ground.paste(cut, ((size[0] - cut.width) // 2, (size[1] - cut.height) // 2), cut)
    return ground

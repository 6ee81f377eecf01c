"""From a layout to the picture with its exact masks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eff_embedded.collages.config import CollageConfig
from eff_embedded.collages.grounds import paint
from eff_embedded.collages.layout import Layout, sample_layout
from eff_embedded.collages.relations import Relation, place_of, relations_between
from eff_embedded.collages.sprites import Sprite, sprite

if TYPE_CHECKING:
    from eff_embedded.collages.captions import Caption
    from eff_embedded.collages.questions import Question

Bytes = npt.NDArray[np.uint8]


class Collage:
    """A painted layout with all that is known of it. Objects are numbered from the back to the front.

    Attributes:
        layout: What was painted.
        picture: uint8 [size, size, 3].
        labels: uint8 [size, size]; 0 where the ground shows, i + 1 where object i shows.
        full: bool [objects, size, size], each object as if nothing were in front of it.
        boxes: int64 [objects, 4], x0, y0, x1, y1 of the full masks in pixels; x1 and y1 lie outside.
        areas: int64 [objects], pixels of the full masks.
    """

    def __init__(self, layout: Layout) -> None:
        size, count = layout.size, len(layout.objects)
        self.layout = layout
        self.picture = paint(layout.ground, size)
        self.labels = np.zeros((size, size), np.uint8)
        self.full = np.zeros((count, size, size), bool)
        self.boxes = np.zeros((count, 4), np.int64)
        self.areas = np.zeros(count, np.int64)
        for i, (placed, drawing) in enumerate(zip(layout.objects, _sprites(layout), strict=True)):
            height, width = drawing.mask.shape
            if placed.x < 0 or placed.y < 0 or placed.x + width > size or placed.y + height > size:
                raise ValueError(
                    f"object {i}, {placed.name}, at x={placed.x}, y={placed.y} with {width} x {height} pixels leaves "
                    f"the picture of {size} x {size}"
                )
            rows, columns = slice(placed.y, placed.y + height), slice(placed.x, placed.x + width)
            blend(self.picture[rows, columns], drawing.rgba)
            self.full[i, rows, columns] = drawing.mask
            self.labels[rows, columns][drawing.mask] = i + 1
            x0, y0, x1, y1 = drawing.box
            self.boxes[i] = (placed.x + x0, placed.y + y0, placed.x + x1, placed.y + y1)
            self.areas[i] = drawing.area

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each object, from the back to the front."""
        return tuple(placed.name for placed in self.layout.objects)

    @cached_property
    def visible(self) -> npt.NDArray[np.bool_]:
        """Where each object shows, bool [objects, size, size]; no two overlap."""
        return self.labels == np.arange(1, len(self.names) + 1, dtype=np.uint8)[:, None, None]

    @cached_property
    def hidden(self) -> npt.NDArray[np.float64]:
        """Hidden fraction of each object, [objects]."""
        seen = np.bincount(self.labels.ravel(), minlength=len(self.names) + 1)[1:]
        return 1 - seen / self.areas

    @property
    def ground(self) -> Bytes:
        """The ground alone, uint8 [size, size, 3]."""
        return paint(self.layout.ground, self.layout.size)

    @property
    def layers(self) -> Bytes:
        """Each object alone, uint8 [objects, size, size, 4], colours multiplied by alpha; see `composite`."""
        size = self.layout.size
        layers = np.zeros((len(self.names), size, size, 4), np.uint8)
        for layer, placed, drawing in zip(layers, self.layout.objects, _sprites(self.layout), strict=True):
            height, width = drawing.mask.shape
            layer[placed.y : placed.y + height, placed.x : placed.x + width] = drawing.rgba
        return layers

    @cached_property
    def relations(self) -> tuple[Relation, ...]:
        """All plain relations of each object towards each other; see `relations_between`."""
        count = len(self.names)
        ahead = [r for i in range(count) for j in range(i + 1, count) for r in relations_between(self, i, j)]
        return tuple(told for r in ahead for told in (r, r.reversed()))

    def place(self, i: int) -> str | None:
        """Which ninth of the picture object i lies in, or None where it lies near a border."""
        return place_of(self, i)

    def tensor(self) -> Tensor:
        """The picture as float32 [3, size, size] from 0 to 1."""
        return torch.from_numpy(self.picture).permute(2, 0, 1).float().div_(255)

    def caption(self, seed: int | None = None, **options: Any) -> Caption:
        """A caption of one or two sentences; options as for `eff_embedded.collages.captions.caption`."""
        from eff_embedded.collages.captions import caption

        return caption(self, seed, **options)

    def questions(self, seed: int | None = None, **options: Any) -> tuple[Question, ...]:
        """Questions with answers; options as for `eff_embedded.collages.questions.questions`."""
        from eff_embedded.collages.questions import questions

        return questions(self, seed, **options)


def blend(under: Bytes, over: Bytes) -> None:
    """Lay a premultiplied picture [h, w, 4] over ``under`` [h, w, 3] in place, rounded to the nearest step."""
    rest = under.astype(np.uint16)
    rest *= 255 - over[..., 3:].astype(np.uint16)
    rest += 128  # (v + (v >> 8)) >> 8 after this is v / 255 rounded, exactly, for every product of two bytes
    rest += rest >> 8
    rest >>= 8
    under[...] = over[..., :3] + rest


def composite(ground: Bytes, layers: Bytes) -> Bytes:
    """Lay the layers [objects, h, w, 4] over the ground [h, w, 3], the first one first."""
    picture = ground.copy()
    for layer in layers:
        blend(picture, layer)
    return picture


def render(layout: Layout) -> Collage:
    """Paint a layout.

    Raises:
        ValueError: an object leaves the picture, or its name is unknown.
    """
    return Collage(layout)


def sample(seed: Any, config: CollageConfig | None = None) -> Collage:
    """Draw a collage; the same seed and config give the same picture, captions and questions everywhere.

    Args:
        seed: An integer, or a generator of numpy, torch or random from which one is drawn.
        config: What to draw; by default one to four objects on 128 x 128 pixels.
    """
    return Collage(sample_layout(seed, config))


def stack(collages: Sequence[Collage]) -> Tensor:
    """The pictures of several collages of one size as uint8 [batch, 3, size, size]."""
    return torch.from_numpy(np.stack([c.picture for c in collages])).permute(0, 3, 1, 2).contiguous()


def _sprites(layout: Layout) -> list[Sprite]:
    return [sprite(o.name, o.size, mirrored=o.mirrored, style=layout.style) for o in layout.objects]

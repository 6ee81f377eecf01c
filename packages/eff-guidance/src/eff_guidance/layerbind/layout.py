"""Layouts: what is where on a picture, and what hides what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eff_kernels.edit import Record
from torch import Tensor

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer(Record):
    """One object of a layout.

    Attributes:
        prompt: What it is.
        box: Left, top, right and bottom in the units of the layout's ``size``. A box that reaches over the border is
            cut; one with its corners swapped is turned.
        mask: Instead of a box, where it is: [h, w], bool or 0 to 1, stretched over the whole picture.
        negative: What it is not, with guidance; None for the negative prompt of the call.
        alpha: How much it covers what lies behind, [h, w] from 0 to 1, stretched over the whole picture; None to
            estimate it or to cover the whole region, as the config says.
    """

    prompt: str
    box: Box | None = None
    mask: Tensor | None = None
    negative: str | None = None
    alpha: Tensor | None = None

    def check(self) -> None:
        """Refuse regions that are none."""
        if (self.box is None) == (self.mask is None):
            raise ValueError(f"the layer {self.prompt!r} needs either a box or a mask")
        if self.box is not None:
            x1, y1, x2, y2 = self.box
            if not all(map(math.isfinite, self.box)) or x1 == x2 or y1 == y2:
                raise ValueError(f"the layer {self.prompt!r} has box={self.box}; use left, top, right, bottom")
        for name in ("mask", "alpha"):
            value = getattr(self, name)
            if value is not None and (value.dim() != 2 or not value.numel()):
                raise ValueError(f"the layer {self.prompt!r} has {name} {list(value.shape)}; use [h, w]")
            if value is not None and not (value.float().min() >= 0 and value.float().max() <= 1):
                raise ValueError(f"the layer {self.prompt!r} has a {name} outside of 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout(Record):
    """Layers from front to back: the first hides what it meets.

    `to_dict` and `from_dict` give and take JSON where no layer has a mask; `save` and `load` work for all.

    Attributes:
        layers: The layers, nearest first; none leaves the pipeline as it is.
        background: What the picture shows apart from them.
        size: Width and height that boxes count in: (1, 1) for shares of the picture, its points, or any other.
    """

    layers: tuple[Layer, ...] = ()
    background: str = ""
    size: tuple[float, float] = (1.0, 1.0)

    def check(self) -> None:
        """Refuse boxes that miss the picture."""
        wide, high = self.size
        if not (wide > 0 and high > 0 and math.isfinite(wide) and math.isfinite(high)):
            raise ValueError(f"size={self.size}; use a width and a height above 0")
        for layer in self.layers:
            if layer.box is None:
                continue
            left, right = sorted(layer.box[::2])
            top, bottom = sorted(layer.box[1::2])
            if right <= 0 or bottom <= 0 or left >= wide or top >= high:
                raise ValueError(
                    f"the layer {layer.prompt!r} has box={layer.box}, which lies outside of the size {self.size}"
                )

    @property
    def caption(self) -> str:
        """A prompt for the whole picture: the layers from front to back and the background."""
        return ", ".join([*(layer.prompt for layer in self.layers), *([self.background] if self.background else [])])

    def reorder(self, order: Sequence[int]) -> Layout:
        """The same layers in another order: ``order`` lists their present places from front to back.

        Raises:
            ValueError: it is no order of all layers.
        """
        if sorted(order) != list(range(len(self.layers))):
            raise ValueError(f"order={list(order)}; use each of 0 to {len(self.layers) - 1} once")
        return dataclasses.replace(self, layers=tuple(self.layers[i] for i in order))

    def edit(self, layer: int, **changes: Any) -> Layout:
        """The same layout with fields of one layer changed.

        Raises:
            IndexError: there is no such layer.
        """
        if not 0 <= layer < len(self.layers):
            raise IndexError(f"layer={layer}; the layout has 0 to {len(self.layers) - 1}")
        changed = list(self.layers)
        changed[layer] = dataclasses.replace(changed[layer], **changes)
        return dataclasses.replace(self, layers=tuple(changed))

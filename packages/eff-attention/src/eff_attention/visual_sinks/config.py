"""Settings of visual attention redistribution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

Ratio = Literal["non_sink", "sink"]
Rows = Literal["after_image", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VARConfig(Settings):
    """What is a sink, which heads look at the picture, and how much attention moves.

    Attributes:
        dims: Hidden dimensions in which sinks are huge, a property of the language model; "auto" takes the published
            ones where they fit, and measures them otherwise (`find_sink_dims`).
        tau: A token is a sink if one of these dimensions is above tau times the root mean square of its hidden state;
            "auto" takes sqrt(0.098 D), which is 20 at D = 4096.
        rho: Share of a head's attention to the picture that must go to tokens that are no sinks; the paper takes 0.8
            for general questions, 0.5 against hallucination, 0.9 for tasks of vision.
        p: Share of the attention to sinks that moves. The published code multiplies sinks by its p = 0.6, which is 0.4
            here.
        min_image_mass: Least attention to the picture of a head that is treated.
        first_layer: First layer that is treated.
        skip_last_layer: Whether the last layer is left alone, as in the paper. The published code treats it.
        rows: "after_image" treats text that a picture with a sink comes before, "all" the tokens of pictures too.
        ratio: "non_sink" asks for rho as said (the paper); "sink" asks that the share of sinks is at most rho (the
            published code), which is the same at 0.5 alone.
    """

    dims: Literal["auto"] | tuple[int, ...] = "auto"
    tau: Literal["auto"] | float = 20.0
    rho: float = 0.5
    p: float = 0.6
    min_image_mass: float = 0.2
    first_layer: int = 2
    skip_last_layer: bool = True
    rows: Rows = "after_image"
    ratio: Ratio = "non_sink"

    def check(self) -> None:
        """See `Settings`."""
        for name in ("rho", "p", "min_image_mass"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)}; use 0 to 1")
        if self.first_layer < 0:
            raise ValueError(f"first_layer={self.first_layer}; use 0 or more")
        if self.dims != "auto":
            check_dims(self.dims, None)
        if self.tau != "auto" and not self.tau > 0:
            raise ValueError(f"tau={self.tau}; use a positive number")

    def threshold(self, size: int) -> float:
        """The threshold for hidden states of ``size`` dimensions.

        Raises:
            ValueError: no token can ever be a sink.
        """
        if self.tau == "auto":
            return math.sqrt(0.098 * size)
        if self.tau >= math.sqrt(size):
            raise ValueError(
                f"tau={self.tau} can never fire: values are at most sqrt({size}) = {math.sqrt(size):.4g}; "
                "use less, or 'auto'"
            )
        return self.tau

    def layers(self, count: int) -> range:
        """Layers to treat of ``count``.

        Raises:
            ValueError: none is left.
        """
        found = range(self.first_layer, count - int(self.skip_last_layer))
        if not found:
            raise ValueError(
                f"first_layer={self.first_layer}, skip_last_layer={self.skip_last_layer} leave none of {count} layers"
            )
        return found


def check_dims(dims: tuple[int, ...], size: int | None) -> None:
    """Refuse an empty list of dimensions, and such that do not exist in hidden states of ``size``."""
    if not dims:
        raise ValueError("dims is empty; name at least one dimension, or use 'auto'")
    if min(dims) < 0 or (size is not None and max(dims) >= size):
        raise ValueError(f"dims={tuple(dims)}; use 0 to {'D' if size is None else size} - 1")

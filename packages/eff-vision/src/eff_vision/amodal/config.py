"""Settings of the model and of its loss."""

from __future__ import annotations

from dataclasses import dataclass, field

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class BEVConfig(Settings):
    """The block of space in front of the camera that features are lifted into (section 3.2).

    Attributes:
        width: Range of x in metres, to the right.
        height: Range of y in metres, downwards.
        depth: Range of z in metres, forwards.
        cells: Cells along x, y and z; those of x and z are divided by 4 on the way to the map.
    """

    width: tuple[float, float] = (-10.0, 10.0)
    height: tuple[float, float] = (-3.5, 1.5)
    depth: tuple[float, float] = (0.0, 20.0)
    cells: tuple[int, int, int] = (64, 5, 64)

    def check(self) -> None:
        """Ranges are not empty, and cells can be halved twice."""
        for name in ("width", "height", "depth"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name} must be a range (low, high), got {(low, high)}")
        if self.depth[0] < 0:
            raise ValueError(f"depth must begin at 0 or more, got {self.depth}")
        if min(self.cells) < 1 or self.cells[0] % 4 or self.cells[2] % 4:
            raise ValueError(f"cells along x and z must be positive multiples of 4, got {self.cells}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EoRaSConfig(Settings):
    """Settings of `EoRaS`; sizes are the paper's.

    Attributes:
        d_model: Width of tokens and slots.
        heads: Heads of attention.
        layers: Decoder layers of each of the three attentions.
        feedforward: Width of their feed-forward layers.
        dropout: In them.
        slots: Object slots.
        features: Channels of the encoder's map.
        crop: Rows and columns of a crop; the encoder's map is 8 times smaller a side.
        bev: The block of space; None leaves the bird's-eye view out.
        learned_positions: Learnt position codes instead of sines.
        bidirectional: Read the clip backwards too, with the same weights. Without, the output of a frame depends on
            frames up to it alone.
    """

    d_model: int = 512
    heads: int = 8
    layers: int = 2
    feedforward: int = 2048
    dropout: float = 0.1
    slots: int = 8
    features: int = 256
    crop: int = 128
    bev: BEVConfig | None = field(default_factory=BEVConfig)
    learned_positions: bool = False
    bidirectional: bool = True

    def check(self) -> None:
        """Sizes fit each other."""
        for name in ("d_model", "heads", "layers", "feedforward", "slots", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.d_model % self.heads or self.d_model % 4:
            raise ValueError(f"d_model={self.d_model} must be a multiple of 4 and of heads={self.heads}")
        if self.crop < 16 or self.crop % 8:
            raise ValueError(f"crop must be a multiple of 8 and at least 16, got {self.crop}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")

    @property
    def grid(self) -> int:
        """Rows and columns of the encoder's map."""
        return self.crop // 8

    @property
    def mask(self) -> int:
        """Rows and columns of a predicted mask: each of three transposed convolutions takes n to 2 n - 1."""
        return 8 * (self.grid - 1) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AmodalLossConfig(Settings):
    """Weights of the loss in addition to that of full masks.

    Attributes:
        visible: Of visible masks.
        occluded: Of full masks, once more, on the hidden pixels alone; the paper's models use 0.
        gamma: Exponent of the focal loss.
    """

    visible: float = 1.0
    occluded: float = 0.0
    gamma: float = 2.0

    def check(self) -> None:
        """Weights are not negative."""
        for name in ("visible", "occluded", "gamma"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")

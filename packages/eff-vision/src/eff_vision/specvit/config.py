"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class LolaSpecViTConfig(Settings):
    """Settings of `LolaSpecViT`. The defaults are small: about 1.5 million weights.

    Attributes:
        in_bands: Bands (or components) of a patch.
        num_classes: Land-cover classes.
        patch_size: Rows and columns around the pixel; odd.
        stem: Channels of the three convolutions over bands, rows and columns.
        dims: Width of each stage.
        depths: Blocks of each stage.
        heads: Heads of each stage.
        window_size: Largest window of attention; smaller grids have a window of their own size.
        band_dropout: Probability that a (channel, band) map of the stem is left out.
        dropout: After the position code.
        drop_path: Probability of leaving out a branch in the last block; rises linearly from 0.
        lora_rank: Rank of the adapters; 0 for none.
        lora_alpha: Their scale is ``lora_alpha / lora_rank``.
        lora_targets: Which linear layers get one: "qkv", "proj", "w1", "w2", "w3", "head".
        lora_gate: Whether each rank has a learnt factor ``2 sigmoid(g)``, which begins at 1.
        paper_compat: The published network with its flaws: 4d-wide SwiGLU between adapters with full-rank gates and
            residuals, windows whose padding takes part. For counts and comparisons; sizes are then those given here.
    """

    in_bands: int = 15
    num_classes: int
    patch_size: int = 15
    stem: tuple[int, int, int] = (8, 16, 48)
    dims: tuple[int, ...] = (48, 96, 192)
    depths: tuple[int, ...] = (2, 2, 2)
    heads: tuple[int, ...] = (4, 8, 16)
    window_size: int = 7
    band_dropout: float = 0.1
    dropout: float = 0.1
    drop_path: float = 0.2
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_targets: tuple[str, ...] = ("qkv", "proj", "w1", "w2", "w3", "head")
    lora_gate: bool = False
    paper_compat: bool = False

    def check(self) -> None:
        """Sizes fit each other."""
        if self.patch_size < 3 or self.patch_size % 2 == 0:
            raise ValueError(f"patch_size must be odd and at least 3, so that it has a centre, got {self.patch_size}")
        for name in ("in_bands", "num_classes", "window_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not len(self.dims) == len(self.depths) == len(self.heads) or not self.dims:
            raise ValueError(
                f"dims, depths and heads must have one length, got {self.dims}, {self.depths}, {self.heads}"
            )
        for dim, heads in zip(self.dims, self.heads, strict=True):
            if dim % heads:
                raise ValueError(f"{heads} heads do not divide a width of {dim}")
        if self.stem[-1] != self.dims[0]:
            raise ValueError(f"the stem must end with the first width {self.dims[0]}, got {self.stem}")
        known = {"qkv", "proj", "w1", "w2", "w3", "head"}
        if unknown := sorted(set(self.lora_targets) - known):
            raise ValueError(f"lora_targets {unknown} are not among {sorted(known)}")
        if self.lora_rank < 0 or not self.lora_alpha > 0:
            raise ValueError(f"wanted lora_rank >= 0 and lora_alpha > 0, got {self.lora_rank} and {self.lora_alpha}")
        for name in ("band_dropout", "dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")

    @classmethod
    def published(cls, num_classes: int) -> LolaSpecViTConfig:
        """The published sizes, 254.6 million weights for nine classes."""
        return cls(
            num_classes=num_classes,
            stem=(32, 64, 96),
            dims=(96, 192, 384),
            depths=(3, 4, 19),
            heads=(4, 8, 16),
            paper_compat=True,
        )

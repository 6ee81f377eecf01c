"""Settings of the encoder with queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class RoiQueryConfig(Settings):
    """Settings of `RoiQueryEncoder`; the defaults are the paper's for a ViT-B.

    Attributes:
        feature_dim: Features of a patch.
        d_model: Width of queries and keys; another one than ``feature_dim`` puts a linear map in front.
        num_heads: Heads of the attention.
        d_ff: Width of the feed-forward layer; 0 leaves it out.
        dropout: After attention and feed-forward.
        position: Code of the patches' places: DETR's sines, a learnt table, or none.
        max_grid: Rows and columns of the learnt table.
        key_source: What the keys carry: place and content, or one of both. Values carry content only.
        value_projection: Whether values are projected; without it attention averages the features themselves.
    """

    feature_dim: int = 768
    d_model: int = 768
    num_heads: int = 16
    d_ff: int = 1024
    dropout: float = 0.1
    position: Literal["sine", "learned"] | None = "sine"
    max_grid: int = 50
    key_source: Literal["both", "content", "position"] = "both"
    value_projection: bool = True

    def check(self) -> None:
        """Sizes are positive and divide each other."""
        for name in ("feature_dim", "d_model", "num_heads", "max_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide d_model={self.d_model}")
        if self.d_ff < 0:
            raise ValueError(f"d_ff must be 0 or more, got {self.d_ff}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if self.position is None and self.key_source == "position":
            raise ValueError("key_source='position' needs a position code, but position is None")
        if self.position == "sine" and self.d_model % 4:
            raise ValueError(f"sine codes need d_model divisible by 4, got {self.d_model}")

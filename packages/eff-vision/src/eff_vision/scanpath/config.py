"""Settings of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class OatConfig(Settings):
    """Settings of `ObjectScanpathTransformer`; sizes are the paper's.

    Attributes:
        d_model: Width: half for appearance, half for the position.
        num_heads: Heads of encoder and decoder.
        enc_layers: Encoder layers.
        dec_layers: Decoder layers.
        d_ff: Width of the feed-forward layers.
        dropout: In all layers.
        pre_norm: Norms in front of the layers instead of behind them.
        pointer_heads: Scores of each pair of decoder step and object, mixed linearly.
        position: "gaussian" codes fall off with distance as a Gaussian; "sine" is the ordinary code; None is none.
        sigma: Width of the Gaussian, in places of the grid.
        max_grid: Most rows and columns.
        feature_dim: Features of an object; None reads crops with a small convolutional network instead.
        centre_appearance: Take from what the objects look like what all objects of the scene share (their background,
            say), and bring the rest to one length. Without this, as in the official code, crops on one background are
            so much alike that the target is not told from the others for a long time.
        reveal_target_position: Tell the encoder where the target is, as the official code does. The model then need not
            search for it: results with and without are not comparable.
        use_pad_class: Keep the constant class of the official code in the loss.
        inhibition: Whether a learnt bias keeps the eye from objects already visited.
    """

    d_model: int = 512
    num_heads: int = 4
    enc_layers: int = 4
    dec_layers: int = 4
    d_ff: int = 512
    dropout: float = 0.1
    pre_norm: bool = False
    pointer_heads: int = 2
    position: Literal["gaussian", "sine"] | None = "gaussian"
    sigma: float = 2.0
    max_grid: int = 14
    feature_dim: int | None = None
    centre_appearance: bool = True
    reveal_target_position: bool = False
    use_pad_class: bool = False
    inhibition: bool = False

    def check(self) -> None:
        """Sizes fit each other."""
        for name in ("d_model", "num_heads", "enc_layers", "dec_layers", "d_ff", "pointer_heads", "max_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.d_model % (2 * self.num_heads):
            raise ValueError(f"d_model={self.d_model} must be a multiple of twice num_heads={self.num_heads}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if self.feature_dim is not None and self.feature_dim < 1:
            raise ValueError(f"feature_dim must be 1 or more or None, got {self.feature_dim}")

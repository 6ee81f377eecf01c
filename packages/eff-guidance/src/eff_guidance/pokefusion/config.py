"""What a style adapter is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class StyleAttentionConfig(Settings):
    """Form of a style adapter.

    Attributes:
        num_styles: Styles in the table.
        tokens_per_style: Learnt tokens of each.
        style_dim: Width of the table.
        layers: Where style is attended to: "decoder" (the paper's: cross-attention of a UNet's ``up_blocks``; of a
            transformer, which has no decoder, the last half of the blocks), "all", "style_block" (SDXL's
            ``up_blocks.0.attentions.1``), or patterns of module names.
        fusion: "decoupled" gives style a softmax of its own; "joint" (an ablation) one softmax over text and style.
        gate_init: Of the number a in each layer's gate tanh(a). At 0 a fresh adapter changes nothing, and at first
            only the gates get a gradient; 0.01 avoids that slow start.
        text_modulated: Whether the table's tokens attend to the text first, so that style can depend on the subject;
            nothing can then be kept between steps.
    """

    num_styles: int = 1
    tokens_per_style: int = 8
    style_dim: int = 256
    layers: str | tuple[str, ...] = "decoder"
    fusion: Literal["decoupled", "joint"] = "decoupled"
    gate_init: float = 0.0
    text_modulated: bool = False

    def check(self) -> None:
        """See `Settings`."""
        for name in ("num_styles", "tokens_per_style", "style_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; wanted at least 1")
        if not self.layers:
            raise ValueError("layers is empty; name some, or use 'decoder', 'all' or 'style_block'")

"""Settings of the brush."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

Block = Literal["double", "single"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextBrushConfig(Settings):
    """How strongly the demonstration and the prompt act on the tokens of the target.

    Attributes:
        shift_image: Share of what target tokens read from the subject that is added once more; 0 is off. Above 0.5
            pictures over-saturate, since nothing brings the norm back.
        shift_text: The same for what they read from the text.
        head_gain: Heads of a block are scaled from 1 (the one whose target rows look least at the text) up to
            1 + ``head_gain``; 0 is off.
        head_rows: Rows that are scaled: "all", or those of the target only ("query").
        blocks: Kinds of blocks in which outputs are shifted; "double" are those with a stream each for text and
            picture (all of SD3's), "single" FLUX's later ones.
        reweight_blocks: Kinds of blocks in which heads are scaled.
        start: Share of the sampler's steps after which the brush begins.
        stop: Share after which it ends; ``start`` equal to ``stop`` is off.
        blend: Whether latents outside of the hole are set back to the noised canvas after each step.
        feather: Width in points of the seam where the result is pasted over the target; everything farther than that
            from the hole stays as it was, bit for bit. None gives the decoder's picture without pasting.
    """

    shift_image: float = 0.3
    shift_text: float = 0.3
    head_gain: float = 0.2
    head_rows: Literal["all", "query"] = "all"
    blocks: tuple[Block, ...] = ("double",)
    reweight_blocks: tuple[Block, ...] = ("double", "single")
    start: float = 0.0
    stop: float = 1.0
    blend: bool = True
    feather: int | None = 8

    def check(self) -> None:
        """See `Settings`."""
        for name in ("shift_image", "shift_text", "head_gain"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}; wanted a finite number of 0 or more")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"start={self.start}, stop={self.stop}; wanted 0 <= start <= stop <= 1")
        if self.feather is not None and self.feather < 0:
            raise ValueError(f"feather={self.feather}; wanted 0 points or more, or None for no pasting")

    @property
    def acts(self) -> bool:
        """Whether attention is changed at all."""
        shifts = bool(self.blocks) and (self.shift_image > 0 or self.shift_text > 0)
        return self.start < self.stop and (shifts or (bool(self.reweight_blocks) and self.head_gain > 0))

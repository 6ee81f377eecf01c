"""Settings of pointing by attention magnets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

Normalize = Literal["text", "joint"]
Direction = Literal["image_to_text", "text_to_image"]

DEFAULT_MAGNETS = (".", "with", "to", "the", "pink")


@dataclass(frozen=True, slots=True, kw_only=True)
class RefAMConfig(Settings):
    """How a picture is shown to the model and what is read from its attention.

    Attributes:
        magnets: Words put behind the expression. A colour among them that the expression uses is exchanged for one that
            it does not use. Empty for none.
        separate_eos: Whether each magnet is tokenised alone, with an end-of-text token of its own, as the published
            figures show. None does so where the text encoder has such a token and can be given token ids.
        context: Text before the expression that describes the picture; its tokens are not counted.
        noise: Share s of noise in the latents, (1 - s) z + s eps, and the time that the model is told.
        draws: Draws of noise that are averaged.
        seed: Of the first draw; the others follow it.
        size: Longer side in points that the picture is scaled to; None for the pipeline's own.
        blocks: Names of blocks or of their attention modules; None for the later ones, see `default_blocks`.
        normalize: "text": each patch divides itself among the words. "joint": weights of the true joint softmax.
        direction: "image_to_text": patches look at words. "text_to_image": words look at patches.
        sink_mass: A token is a sink if it receives more than this many times its even share of the text's attention ...
        sink_variation: ... and its map varies less than this, deviation over mean.
        noun_phrase: Whether only the words up to the first preposition or relative word count.
        spatial_bias: Whether words such as "left" weigh the map along that direction.
        rescale: Whether each word's map is brought to 0..1 before they are added.
    """

    magnets: tuple[str, ...] = DEFAULT_MAGNETS
    separate_eos: bool | None = None
    context: str = ""
    noise: float = 0.3
    draws: int = 1
    seed: int = 0
    size: int | None = None
    blocks: tuple[str, ...] | None = None
    normalize: Normalize = "text"
    direction: Direction = "image_to_text"
    sink_mass: float = 4.0
    sink_variation: float = 0.5
    noun_phrase: bool = False
    spatial_bias: bool = True
    rescale: bool = False

    def check(self) -> None:
        """See `Settings`."""
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise={self.noise}; it is a share, at least 0 and below 1")
        for name in ("draws", "size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}; at least 1")
        if self.sink_mass <= 0 or self.sink_variation < 0:
            raise ValueError(
                f"sink_mass={self.sink_mass}, sink_variation={self.sink_variation}; above 0, and at least 0"
            )
        if any(not magnet.strip() for magnet in self.magnets):
            raise ValueError(f"magnets={self.magnets}; none may be empty")

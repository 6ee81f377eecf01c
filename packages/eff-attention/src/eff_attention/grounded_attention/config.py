"""Settings of PAINT and of PAI."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

HeadGain = Literal["none", "attention_mass"] | tuple[tuple[float, ...], ...]
Rows = Literal["last", "all_text"]
Saliency = Literal["cls", "received"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PAIConfig(Settings):
    """Raise attention to all tokens of pictures.

    Attributes:
        alpha: A logit e becomes e + alpha |e|.
        first_layer: First layer of the language model that is treated.
        last_layer: Last layer that is; None for the last of all.
        head_gain: Factor of the strength of each head: "none" is 1 (the published code); "attention_mass" is a head's
            attention to pictures at the prompt's last token over the mean of its layer, within 0.5 and 1.5; or numbers
            by layer and head.
        rows: "last" raises the last query of each pass alone, "all_text" all queries of text behind the picture.
    """

    alpha: float = 0.2
    first_layer: int = 2
    last_layer: int | None = None
    head_gain: HeadGain = "none"
    rows: Rows = "last"

    def check(self) -> None:
        """See `Settings`."""
        check_strength("alpha", self.alpha)
        if self.first_layer < 0 or (self.last_layer is not None and self.last_layer < self.first_layer):
            raise ValueError(
                f"first_layer={self.first_layer}, last_layer={self.last_layer}; use 0 <= first_layer <= last_layer"
            )
        if not isinstance(self.head_gain, str):
            for row in self.head_gain:
                for gain in row:
                    check_strength("head_gain", gain)

    def layers(self, count: int) -> range:
        """Layers to treat of ``count``.

        Raises:
            ValueError: a layer does not exist.
        """
        last = count - 1 if self.last_layer is None else self.last_layer
        if not self.first_layer <= last < count:
            raise ValueError(
                f"first_layer={self.first_layer}, last_layer={self.last_layer}; the model has layers 0..{count - 1}"
            )
        return range(self.first_layer, last + 1)

    def gains(self, count: int, heads: int) -> tuple[tuple[float, ...], ...] | None:
        """``head_gain`` as numbers, None if it is a rule.

        Raises:
            ValueError: there are not as many as layers and heads.
        """
        if isinstance(self.head_gain, str):
            return None
        shape = (len(self.head_gain), *{len(row) for row in self.head_gain})
        if shape != (count, heads):
            raise ValueError(
                f"head_gain has shape {shape}; use one number for each of {count} layers and {heads} heads"
            )
        return self.head_gain


@dataclass(frozen=True, slots=True, kw_only=True)
class PAINTConfig(PAIConfig):
    """Raise attention to some tokens of pictures, chosen by what the vision tower looks at.

    The published code has beta = 0.3, alpha = 0.7 and no spatial tokens.

    Attributes:
        alpha: For local and spatial tokens.
        beta: For summary tokens.
        local_ratio: Share of a picture's tokens that are local: the most attended ones in the tower's first layer.
        spatial_ratio: Share that is spatial: those that other patches attend to there; the paper's best is 0.05.
        summary_iqr: Summary tokens are above Q3 + summary_iqr (Q3 - Q1) in a late layer; None for no summary tokens.
        local_layer: Layer of the tower that local and spatial tokens are chosen by.
        summary_layer: Layer of the tower that summary tokens are chosen by.
        saliency: "cls" asks what the class token attends to; "received" what patches attend to on average, for towers
            without a class token (SigLIP, Qwen2-VL).
    """

    alpha: float = 0.7
    beta: float = 0.4
    local_ratio: float = 0.25
    spatial_ratio: float = 0.0
    summary_iqr: float | None = 1.5
    local_layer: int = 0
    summary_layer: int = -2
    saliency: Saliency = "cls"

    def check(self) -> None:
        """See `Settings`."""
        PAIConfig.check(self)
        check_strength("beta", self.beta)
        check_ratio("local_ratio", self.local_ratio)
        if self.spatial_ratio:
            check_ratio("spatial_ratio", self.spatial_ratio)
        if self.summary_iqr is not None:
            check_strength("summary_iqr", self.summary_iqr)


def check_strength(name: str, value: float) -> None:
    """Refuse what is negative or not finite."""
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name}={value}; use a finite number of 0 or more")


def check_ratio(name: str, value: float) -> None:
    """Refuse what is no share above 0."""
    if not 0.0 < value <= 1.0:
        raise ValueError(f"{name}={value}; use more than 0 and at most 1")

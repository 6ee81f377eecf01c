"""Settings of the alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from eff_kernels.edit import Settings

from eff_guidance.alignment.losses import CHUNK


@dataclass(frozen=True, slots=True, kw_only=True)
class HolisticAlignmentConfig(Settings):
    """What is aligned, and how strongly. Blocks count from 0. The defaults are the paper's for SiT-XL/2.

    Attributes:
        feature_layer: Block of the student whose output is aligned with the teacher's features.
        attention_pairs: (block of the student, block of the teacher) whose attention is aligned.
        heads: How many heads, the first ones of both models; further ones of the student stay free.
        lambda_feature: Weight of the loss of features; 0 leaves it out (with REPA's 0.5 and ``lambda_attention=0`` the
            method is REPA).
        lambda_attention: Weight of the loss of attention; 0 leaves it out.
        teacher_dim: Width of the teacher's features.
        projector_dim: Width of the projector's two hidden layers.
        interpolate: Whether different numbers of tokens are brought together on the smaller grid.
        student_grid: Rows and columns of the student's picture tokens; None: a square.
        blocks: Patterns of the names of the student's blocks; None: see `find_blocks`.
        chunk: Most logits of attention in memory at a time.
    """

    tags: ClassVar[Mapping[str, str]] = {"method": "holistic_alignment"}

    feature_layer: int = 7
    attention_pairs: tuple[tuple[int, int], ...] = ((4, 8), (5, 9), (6, 10), (7, 11))
    heads: int = 12
    lambda_feature: float = 0.5
    lambda_attention: float = 0.5
    teacher_dim: int = 768
    projector_dim: int = 2048
    interpolate: bool = False
    student_grid: tuple[int, int] | None = None
    blocks: tuple[str, ...] | None = None
    chunk: int = CHUNK

    def check(self) -> None:
        """Refuse what is out of range."""
        for name in ("heads", "teacher_dim", "projector_dim", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; use 1 or more")
        for name in ("lambda_feature", "lambda_attention"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}; use 0 or a positive number")
        if self.feature_layer < 0 or any(n < 0 for pair in self.attention_pairs for n in pair):
            raise ValueError(
                f"feature_layer={self.feature_layer}, attention_pairs={self.attention_pairs}; blocks count from 0"
            )
        if self.lambda_attention and not self.attention_pairs:
            raise ValueError("attention_pairs=() with lambda_attention above 0; give pairs, or set lambda_attention=0")

    @classmethod
    def for_sit(cls, size: Literal["B", "L", "XL"], **changes: Any) -> Self:
        """The paper's settings for SiT-B, -L or -XL (and DiT-XL) with DINOv2 ViT-B/14.

        `STOP` has the steps at which the paper ends the alignment.

        Raises:
            ValueError: another size.
        """
        if size not in _SIT:
            raise ValueError(f"size={size!r}; use one of {', '.join(map(repr, _SIT))}")
        return cls(**{**_SIT[size], **changes})


_LATE = ((4, 8), (5, 9), (6, 10), (7, 11))
_SIT: dict[str, dict[str, Any]] = {
    "B": {"feature_layer": 4, "attention_pairs": ((2, 7), (3, 9), (4, 11))},
    "L": {"feature_layer": 7, "attention_pairs": _LATE},
    "XL": {"feature_layer": 7, "attention_pairs": _LATE},
}
STOP: Mapping[str, int] = {"B": 100_000, "L": 250_000, "XL": 250_000, "MM-DiT": 200_000, "XL-512": 300_000}
"""Steps (of 256 pictures) after which the paper's runs end the alignment."""

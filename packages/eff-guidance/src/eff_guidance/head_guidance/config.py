"""Settings of SoftPAG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings

from eff_guidance.head_guidance.heads import Head, read_head

Target = Literal[
    "identity", "uniform", "query_mean", "query_mean_image", "query_mean_text", "max", "image_identity", "image_renorm",
    "ii_zero", "it_zero", "ti_zero", "tt_zero", "ii_mask", "it_mask", "ti_mask", "tt_mask",
]  # fmt: skip
Path = Literal["linear", "slerp", "log_linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPAGConfig(Settings):
    """Which heads are damaged, how, how far, and how hard the guidance pushes away from the damage.

    Attributes:
        heads: Pairs (layer, head), triples (layer, head, "attn2") for SD3.5's image-only attention, or "all" for each
            head of `list_heads`.
        target: What the attention map P is moved to, see `soft_perturb_attention`.
        strength: u from 0 (nothing) to 1 (all of P), for all heads, or one for each in their order. Search with 1;
            0.25 to 0.5 keeps pictures from looking fried.
        path: How it is moved: "linear" is ``(1 - u) A + u P``; "slerp" and "log_linear" are for target "identity" and
            compute the map in blocks, which is slow.
        scale: w in ``cond + w (cond - damaged)``; 0 is off. 3 to 5 for SD3, up to 8 for FLUX without real CFG.
            diffusers' PAG guider without CFG calls ``w + 1`` its scale.
        start: First step with guidance, as a fraction of the steps; step k of T has it if
            ``int(start T) <= k < int(stop T)``.
        stop: First step without, as a fraction.
    """

    heads: tuple[tuple[str | int, ...], ...] | Literal["all"]
    target: Target = "identity"
    strength: float | tuple[float, ...] = 1.0
    path: Path = "linear"
    scale: float = 3.0
    start: float = 0.0
    stop: float = 1.0

    def check(self) -> None:
        """Refuse what lies out of range.

        Raises:
            ValueError: a strength or window outside of 0..1, another number of strengths than heads, a path that a
                target does not have.
        """
        if self.heads != "all":
            object.__setattr__(self, "heads", tuple(read_head(head) for head in self.heads))
        check_strength(self.strength, None if self.heads == "all" else len(self.heads))
        if self.path != "linear" and self.target != "identity":
            raise ValueError(f"path={self.path!r} is for target 'identity', not {self.target!r}; use 'linear'")
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise ValueError(f"start={self.start}, stop={self.stop}; use 0 <= start <= stop <= 1")
        if not -1e6 < self.scale < 1e6:
            raise ValueError(f"scale={self.scale}; use a finite number")

    @property
    def named(self) -> tuple[Head, ...] | None:
        """The heads as `Head`; None for all."""
        return None if self.heads == "all" else tuple(Head(*head) for head in self.heads)  # type: ignore[arg-type]


def check_strength(strength: float | tuple[float, ...], count: int | None) -> tuple[float, ...]:
    """Strengths as a tuple.

    Raises:
        ValueError: one is outside of 0..1, or there is another number of them than heads.
    """
    many = strength if isinstance(strength, tuple) else (strength,)
    if wrong := [u for u in many if not 0.0 <= u <= 1.0]:
        raise ValueError(f"strength={wrong[0]}; use 0 to 1")
    if isinstance(strength, tuple) and count is not None and len(many) != count:
        raise ValueError(f"{len(many)} strengths for {count} heads; use one number, or one a head")
    return many

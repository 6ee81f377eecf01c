"""Settings of the model and of its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eff_kernels.edit import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiViewConfig(Settings):
    """Settings of `MultiViewTransformer`. The defaults are a small model of 0.9 M weights; `vggt_1b` has VGGT's.

    Attributes:
        patch_size: Pixels a side of a patch.
        dim: Width of tokens.
        heads: Heads of all attention.
        depth: Pairs of a frame block (each view by itself) and a global block (all views).
        registers: Register tokens a view, in addition to the camera token.
        encoder: "conv" makes patches by two convolutions, "vit" by a vision transformer with ``encoder_depth`` blocks.
        encoder_depth: Blocks of that transformer.
        encoder_registers: Its register tokens.
        encoder_grid: Rows and columns of its learnt position codes; other sizes are interpolated.
        rope_base: Of the rotary position codes.
        qk_norm: Normalise queries and keys of frame, global and camera blocks.
        layer_scale: First value of the factors on branches.
        taps: Pairs of blocks whose tokens the dense heads read, 0-based: two for "shuffle", four for "dpt".
        head: "shuffle" makes maps by two pixel shuffles with the picture as a second input, "dpt" by DPT's pyramid.
        head_dim: Channels of the dense heads.
        points: Whether a second dense head gives points of the world.
        camera_depth: Blocks of the camera head.
        camera_steps: Refinements of the pose.
        fov_activation: "softplus", or "relu" as VGGT has it, which can get stuck at zero.
    """

    patch_size: int = 8
    dim: int = 64
    heads: int = 2
    depth: int = 3
    registers: int = 2
    encoder: Literal["conv", "vit"] = "conv"
    encoder_depth: int = 0
    encoder_registers: int = 0
    encoder_grid: int = 37
    rope_base: float = 100.0
    qk_norm: bool = True
    layer_scale: float = 0.1
    taps: tuple[int, ...] = (1, 2)
    head: Literal["shuffle", "dpt"] = "shuffle"
    head_dim: int = 48
    points: bool = False
    camera_depth: int = 2
    camera_steps: int = 4
    fov_activation: Literal["softplus", "relu"] = "softplus"

    def check(self) -> None:
        """Sizes fit each other."""
        for name in ("patch_size", "dim", "heads", "depth", "head_dim", "camera_depth", "camera_steps", "encoder_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.dim % self.heads or (self.dim // self.heads) % 4:
            raise ValueError(f"dim / heads must be a multiple of 4, got {self.dim} / {self.heads}")
        if self.registers < 0 or self.encoder_registers < 0:
            raise ValueError(f"registers must be 0 or more, got {self.registers} and {self.encoder_registers}")
        wanted = 2 if self.head == "shuffle" else 4
        if len(self.taps) != wanted or not all(0 <= t < self.depth for t in self.taps):
            raise ValueError(f"taps must be {wanted} of 0 .. {self.depth - 1} for head={self.head!r}, got {self.taps}")
        if self.encoder == "conv" and self.patch_size % 4:
            raise ValueError(f"encoder='conv' needs a patch_size divisible by 4, got {self.patch_size}")
        if self.head == "shuffle" and self.patch_size % 4:
            raise ValueError(f"head='shuffle' needs a patch_size divisible by 4, got {self.patch_size}")
        if self.encoder == "conv" and (self.encoder_depth or self.encoder_registers):
            raise ValueError("encoder_depth and encoder_registers are only used with encoder='vit'")
        if self.encoder == "vit" and self.encoder_depth < 1:
            raise ValueError(f"encoder='vit' needs encoder_depth of 1 or more, got {self.encoder_depth}")

    @classmethod
    def vggt_1b(cls) -> MultiViewConfig:
        """The sizes of VGGT-1B (arXiv 2503.11651), without its head for point tracks."""
        return cls(
            patch_size=14,
            dim=1024,
            heads=16,
            depth=24,
            registers=4,
            encoder="vit",
            encoder_depth=24,
            encoder_registers=4,
            layer_scale=0.01,
            taps=(4, 11, 17, 23),
            head="dpt",
            head_dim=256,
            points=True,
            camera_depth=4,
            fov_activation="relu",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiViewLossConfig(Settings):
    """Weights of `multiview_loss` (Lite3R, appendix on training).

    Attributes:
        translation, rotation, fov: Weights within the camera loss.
        gamma: Each refinement of the pose counts this much less than the next.
        translation_limit: Errors of translation are cut off here.
        confidence: Weight of the logarithm of confidences.
        quantile: Depth errors above this quantile do not count.
        scale_range: The factor that brings predictions to the truth's scale stays within this range.
        min_pixels: Views count for the camera loss if view 0 has more valid pixels than this.
    """

    translation: float = 1.0
    rotation: float = 1.0
    fov: float = 0.5
    gamma: float = 0.6
    translation_limit: float = 100.0
    confidence: float = 0.2
    quantile: float = 0.95
    scale_range: tuple[float, float] = (0.1, 10.0)
    min_pixels: int = 100

    def check(self) -> None:
        """Ranges are possible."""
        if not 0 < self.quantile <= 1:
            raise ValueError(f"quantile must be above 0 and at most 1, got {self.quantile}")
        if not 0 < self.scale_range[0] <= self.scale_range[1]:
            raise ValueError(f"scale_range must be positive and in order, got {self.scale_range}")

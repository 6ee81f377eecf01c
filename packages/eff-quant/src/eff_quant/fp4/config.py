"""The settings of FP4: one frozen dataclass that checks itself and travels as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from eff_quant.settings import Backend, MethodSettings, check_out_dtype

Format = Literal["nvfp4", "mxfp4"]
ScaleRounding = Literal["floor", "even", "rceil", "ceil"]
Activations = Literal["dynamic", "static"]

# Values of the last axis that share one block scale.
BLOCK: dict[str, int] = {"nvfp4": 16, "mxfp4": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class FP4Config(MethodSettings):
    """How linear layers are turned into 4-bit floating point (E2M1 values in blocks with a shared scale).

    Attributes:
        format: ``"nvfp4"``: blocks of 16 with an E4M3 scale, and one float32 scale per tensor; 4.5 bits a weight.
            ``"mxfp4"``: blocks of 32 with a power of two as scale; 4.25 bits a weight.
        activations: None leaves activations as they are (W4A16). ``"dynamic"`` rounds them to the same format at each
            call (W4A4). ``"static"`` (nvfp4 only) does so with a tensor scale that `calibrate_fp4` has found, which is
            what serving engines do.
        scale_rounding: How mxfp4 chooses a block's exponent from its largest magnitude: ``"floor"`` (OCP), ``"even"``
            (compressed-tensors), ``"rceil"`` (NVIDIA) or ``"ceil"``. nvfp4 has no such choice.
        skip: Modules that keep their weights, as patterns of `eff_kernels.matches`. ``"lm_head"`` also stands for the
            output embedding of a transformers model, whatever that is called.
        fuse_groups: Names of sibling layers that serving engines run as one, and that therefore get one tensor scale.
        out_dtype: dtype of the layers' outputs; None means that of the input.
        backend: Backend of the op `eff_kernels.fp4_linear`: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: a value is out of range; the message names it and says what is wanted.
        TypeError: a value is of the wrong kind.
    """

    format: Format = "nvfp4"
    activations: Activations | None = None
    scale_rounding: ScaleRounding = "floor"
    skip: tuple[str, ...] = ("lm_head",)
    fuse_groups: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    out_dtype: torch.dtype | None = None
    backend: Backend = "auto"

    # The method's name in transformers; with it an FP4Config can be given to from_pretrained as it is.
    quant_method: ClassVar[str] = "eff_fp4"

    def check(self) -> None:
        """See the class."""
        names = [name for group in self.fuse_groups for name in group]
        if any(len(group) < 2 for group in self.fuse_groups) or len(set(names)) < len(names):
            raise ValueError(
                f"fuse_groups={self.fuse_groups!r}; a group has two names or more, and a name is in one group only"
            )
        check_out_dtype(self.out_dtype)
        if self.format == "nvfp4" and self.scale_rounding != "floor":
            raise ValueError(
                f"scale_rounding={self.scale_rounding!r} with format='nvfp4', whose block scales are E4M3 numbers; "
                "leave it out or use format='mxfp4'"
            )
        if self.format == "mxfp4" and self.activations == "static":
            raise ValueError(
                "activations='static' with format='mxfp4', which has no tensor scale to calibrate; use 'dynamic'"
            )

    @property
    def block(self) -> int:
        """How many values share a block scale: 16 (nvfp4) or 32 (mxfp4)."""
        return BLOCK[self.format]

"""The settings of FP8: how a tensor is rounded, how a model is trained under that rounding, how it is stored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from eff_kernels.edit import Settings

from eff_quant.settings import Backend, MethodSettings, check_out_dtype

Dtype = Literal["e4m3", "e5m2"]
Granularity = Literal["row", "tensor", "block", "mx32"]
Activations = Literal["none", "dynamic"]

TORCH_DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8Spec(Settings):
    """How a tensor is rounded to scaled FP8.

    Attributes:
        dtype: ``"e4m3"`` (3 bits of fraction, largest number 448) or ``"e5m2"`` (2 bits, 57344).
        granularity: What shares a scale. ``"row"``: a row of the last axis (a token of activations, an output of a
            weight). ``"tensor"``: everything. ``"block"``: 128 entries of a row of activations, 128 x 128 of a weight.
            ``"mx32"``: 32 entries of a row, with a power of two as scale. Blocks at the edge may be smaller.
        power_of_two: Round scales up to powers of two; what was rounded once is then never changed again.

    Raises:
        ValueError: an unknown dtype or granularity.
    """

    dtype: Dtype = "e4m3"
    granularity: Granularity = "row"
    power_of_two: bool = False

    def check(self) -> None:
        """See the class."""
        if self.granularity == "mx32":
            object.__setattr__(self, "power_of_two", True)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8QATConfig(Settings):
    """Which linear layers compute with FP8 noise, and of which kind (`prepare_qat_`).

    Attributes:
        weight: How weights are rounded.
        activation: How inputs are rounded; None leaves them as they are.
        where: Layers to prepare, as patterns of `eff_kernels.matches`.
        skip: Layers to leave; ``"lm_head"`` also stands for the output embedding of a transformers model.
        scale_grad: Let the gradient also flow through the scale, to the largest entry of each row (as torchao does).
            By default the rounding is the identity in the backward, and nothing is kept for it.
        cache_frozen_weights: Round a weight without gradient once, and again when it has changed; costs a copy of it.

    Raises:
        ValueError: ``scale_grad`` with scales that are powers of two, which have no gradient.
        TypeError: a value is of the wrong kind.
    """

    weight: FP8Spec = field(default_factory=FP8Spec)
    activation: FP8Spec | None = field(default_factory=FP8Spec)
    where: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ("lm_head",)
    scale_grad: bool = False
    cache_frozen_weights: bool = True

    def check(self) -> None:
        """See the class."""
        specs = [s for s in (self.weight, self.activation) if s is not None]
        if self.scale_grad and any(s.power_of_two for s in specs):
            raise ValueError("scale_grad=True with scales that are powers of two, which have no gradient; leave it out")


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8Config(MethodSettings):
    """How linear layers are stored in FP8 with one scale for each row of a weight.

    Attributes:
        activations: ``"none"`` leaves them as they are (W8A16); ``"dynamic"`` rounds each row at each call (W8A8).
        dtype: ``"e4m3"``, which other libraries read, or ``"e5m2"``.
        power_of_two: Round the weights' scales up to powers of two.
        skip: Modules that keep their weights, as patterns of `eff_kernels.matches`. ``"lm_head"`` also stands for the
            output embedding of a transformers model, whatever that is called.
        out_dtype: dtype of the layers' outputs; None means that of the input.
        backend: Backend of the op `eff_kernels.fp8_linear`: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: a value is out of range; the message names it and says what is wanted.
        TypeError: a value is of the wrong kind.
    """

    activations: Activations = "none"
    dtype: Dtype = "e4m3"
    power_of_two: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    out_dtype: torch.dtype | None = None
    backend: Backend = "auto"

    # The method's name in transformers; with it an FP8Config can be given to from_pretrained as it is.
    quant_method: ClassVar[str] = "eff_fp8"

    def check(self) -> None:
        """See the class."""
        check_out_dtype(self.out_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return TORCH_DTYPES[self.dtype]

"""The settings of FP8: how a tensor is rounded, how a model is trained under that rounding, how it is stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch

from eff_quant.settings import (
    BACKENDS,
    check_choice,
    check_known,
    check_out_dtype,
    check_patterns,
    from_json,
    to_json,
)

Dtype = Literal["e4m3", "e5m2"]
Granularity = Literal["row", "tensor", "block", "mx32"]
Activations = Literal["none", "dynamic"]

VERSION = 1
TORCH_DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8Spec:
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

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("granularity", self.granularity, get_args(Granularity))
        if self.granularity == "mx32":
            object.__setattr__(self, "power_of_two", True)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return TORCH_DTYPES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8QATConfig:
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

    def __post_init__(self) -> None:
        check_patterns(self, "where", "skip")
        if not isinstance(self.weight, FP8Spec) or not isinstance(self.activation, FP8Spec | None):
            raise TypeError(
                f"weight={self.weight!r}, activation={self.activation!r}; use an FP8Spec, or None for inputs"
            )
        specs = [s for s in (self.weight, self.activation) if s is not None]
        if self.scale_grad and any(s.power_of_two for s in specs):
            raise ValueError("scale_grad=True with scales that are powers of two, which have no gradient; leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, with the format version."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("weight", "activation"):
            spec = getattr(self, name)
            values[name] = None if spec is None else {f.name: getattr(spec, f.name) for f in fields(spec)}
        return {"version": VERSION, **values, "where": list(self.where), "skip": list(self.skip)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FP8QATConfig:
        """Rebuild the settings from `to_dict`.

        Raises:
            ValueError: a version that this code does not know, or an unknown entry.
        """
        values = dict(values)
        if (version := values.pop("version", VERSION)) != VERSION:
            raise ValueError(f"settings of version {version!r}; this eff_quant reads version {VERSION}")
        check_known(values, cls)
        for name in ("weight", "activation"):
            if isinstance(values.get(name), Mapping):
                values[name] = FP8Spec(**values[name])
        return cls(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class FP8Config:
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
    backend: str = "auto"

    # The method's name in transformers; with it an FP8Config can be given to from_pretrained as it is.
    quant_method: ClassVar[str] = "eff_fp8"

    def __post_init__(self) -> None:
        check_choice("activations", self.activations, get_args(Activations))
        check_choice("dtype", self.dtype, get_args(Dtype))
        check_choice("backend", self.backend, BACKENDS)
        check_patterns(self, "skip")
        check_out_dtype(self.out_dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return TORCH_DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, with the format version and the method's name."""
        return to_json(self, VERSION)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FP8Config:
        """Rebuild the settings from `to_dict`.

        Raises:
            ValueError: another method's settings, a version that this code does not know, or an unknown entry.
        """
        return cls(**from_json(cls, values, VERSION)[0])

"""The settings of QuantVLA's linear layers: one frozen dataclass that checks itself and travels as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from eff_quant.quantvla.rotation import Kind
from eff_quant.quantvla.rounding import CANDIDATES
from eff_quant.settings import BACKENDS, check_choice, check_out_dtype, check_patterns, from_json, to_json

Activation = Literal["dynamic_token", "static_folded"]
Reduce = Literal["max", "mean"]

VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class W4A8Config:
    """How linear layers are turned into 4-bit weights and 8-bit activations (QuantVLA, arXiv 2602.20309).

    Attributes:
        weight_bits: 4 or 8.
        activation: ``"dynamic_token"``: one scale for each row of the activations, found on the fly.
            ``"static_folded"``: one scale for each input column, from `calibrate_activations`, folded into the weight
            before that is rounded.
        act_percentile: With static scales: the percentile of the magnitudes of a column in one call that fills the
            eight bits. Larger ones are clipped.
        reduce: With static scales: how the calls of all calibration batches are put together.
        rotation: Orthogonal matrices on blocks of input columns: ``"svd"`` of the weight, ``"hadamard"``, or None.
        row_rotation: Rotate blocks of output rows as well, and the outputs back.
        block: Size of the blocks.
        permute: Deal the input columns out to the blocks by energy, so that each block gets its share of outliers.
        permute_blend: Share of the weights' energy in that, the rest being that of the calibrated activations. Without
            calibration there are only the weights to go by.
        candidates: Divisors of a row's largest magnitude to try as its scale; the least squared error decides.
        skip: Modules that keep their weights, as patterns of `eff_kernels.matches`.
        out_dtype: dtype of the layers' outputs; None means that of the input.
        backend: Backend of the integer product: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: a value is out of range; the message names it and says what is wanted.
        TypeError: a value is of the wrong kind.
    """

    weight_bits: int = 4
    activation: Activation = "dynamic_token"
    act_percentile: float = 99.9
    reduce: Reduce = "max"
    rotation: Kind | None = "svd"
    row_rotation: bool = False
    block: int = 64
    permute: bool = False
    permute_blend: float = 0.15
    candidates: tuple[float, ...] = CANDIDATES
    skip: tuple[str, ...] = ("lm_head",)
    out_dtype: torch.dtype | None = None
    backend: str = "auto"

    # The method's name in config.json.
    quant_method: ClassVar[str] = "eff_w4a8"

    def __post_init__(self) -> None:
        check_choice("weight_bits", self.weight_bits, (4, 8))
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("reduce", self.reduce, get_args(Reduce))
        check_choice("rotation", self.rotation, (*get_args(Kind), None))
        check_choice("backend", self.backend, BACKENDS)
        _check_range("act_percentile", self.act_percentile, 0, 100)
        _check_range("permute_blend", self.permute_blend, 0, 1)
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2:
            raise ValueError(f"block={self.block!r}; use a whole number of 2 or more, such as 64")
        if self.rotation == "hadamard" and self.block & (self.block - 1):
            raise ValueError(f"block={self.block} with rotation='hadamard'; use a power of two, such as 64")
        if self.rotation is None and (self.row_rotation or self.permute):
            raise ValueError("row_rotation and permute do nothing without rotation; use rotation='svd' or 'hadamard'")
        object.__setattr__(self, "candidates", _candidates(self.candidates))
        check_patterns(self, "skip")
        check_out_dtype(self.out_dtype)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, with the format version and the method's name."""
        return to_json(self, VERSION)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> W4A8Config:
        """Rebuild the settings from `to_dict`.

        Raises:
            ValueError: another method's settings, a version that this code does not know, or an unknown entry.
        """
        return cls(**from_json(cls, values, VERSION)[0])


def _check_range(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}; use a number from {low} to {high}")
    if math.isnan(value) or not low <= value <= high:
        raise ValueError(f"{name}={value!r}; use a number from {low} to {high}")


def _candidates(values: Any) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    if not values or not all(math.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"candidates={values}; use one or more divisors above 0, such as {CANDIDATES}")
    return values

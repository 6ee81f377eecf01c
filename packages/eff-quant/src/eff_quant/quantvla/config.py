"""The settings of QuantVLA's linear layers: one frozen dataclass that checks itself and travels as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from eff_quant.quantvla.rotation import Kind
from eff_quant.quantvla.rounding import CANDIDATES
from eff_quant.settings import Backend, MethodSettings, check_out_dtype

Activation = Literal["dynamic_token", "static_folded"]
Reduce = Literal["max", "mean"]


@dataclass(frozen=True, kw_only=True, slots=True)
class W4A8Config(MethodSettings):
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

    weight_bits: Literal[4, 8] = 4
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
    backend: Backend = "auto"

    # The method's name in config.json.
    quant_method: ClassVar[str] = "eff_w4a8"

    def check(self) -> None:
        """See the class."""
        for name, high in (("act_percentile", 100), ("permute_blend", 1)):
            if not 0 <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name}={value!r}; use a number from 0 to {high}")
        if self.block < 2:
            raise ValueError(f"block={self.block!r}; use a whole number of 2 or more, such as 64")
        if self.rotation == "hadamard" and self.block & (self.block - 1):
            raise ValueError(f"block={self.block} with rotation='hadamard'; use a power of two, such as 64")
        if self.rotation is None and (self.row_rotation or self.permute):
            raise ValueError("row_rotation and permute do nothing without rotation; use rotation='svd' or 'hadamard'")
        if not self.candidates or not all(math.isfinite(v) and v > 0 for v in self.candidates):
            raise ValueError(f"candidates={self.candidates}; use one or more divisors above 0, such as {CANDIDATES}")
        check_out_dtype(self.out_dtype)

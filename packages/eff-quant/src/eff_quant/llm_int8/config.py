"""The settings of LLM.int8(): one frozen dataclass that checks itself and travels as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch

from eff_quant.settings import BACKENDS, check_choice, check_out_dtype, check_patterns, from_json, to_json

Activation = Literal["dynamic", "none"]
OutlierWeights = Literal["int8", "original"]

VERSION = 2
"""Version 2 added activation_group; settings of version 1 mean one scale for the whole row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Config:
    """How linear layers are turned into int8 (LLM.int8(), arXiv 2208.07339).

    Attributes:
        threshold: Activation columns that hold an entry of at least this size are multiplied in the activation's own
            dtype instead of int8 (section 3.2 of the paper). 0 switches the decomposition off. It plays
            no part with ``activation="none"``.
        skip: Modules that keep their weights, as patterns of `eff_kernels.matches`: a name or its last parts, a shell
            pattern, or ``re:`` and a regular expression. ``"lm_head"`` also stands for the output embedding of a
            transformers model, whatever that is called.
        activation: ``"dynamic"`` quantises each activation row on the fly (W8A8); ``"none"`` multiplies float
            activations with dequantised weights (W8A16).
        activation_group: Each activation row gets one scale for every so many consecutive columns, a multiple of 32, so
            that a large entry costs the precision of its group alone. None: one scale for the whole row, as in the
            paper and in bitsandbytes. It plays no part with ``activation="none"``.
        per_token_outliers: Look for outliers in each row by itself. A row then gives the same result alone and in any
            batch.
        outlier_weights: Weights of the columns in ``outlier_columns``: ``"original"`` keeps a copy in the original
            dtype as in the paper, ``"int8"`` (no static columns) dequantises outlier columns from int8 as bitsandbytes
            does.
        outlier_columns: Static outlier columns by module name, found by `outlier_report`. Only with
            ``outlier_weights="original"``; these columns always stay out of the int8 product.
        out_dtype: dtype of the layers' outputs; None means that of the input.
        backend: Backend of the op `eff_kernels.int8_linear`: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Raises:
        ValueError: a value is out of range; the message names it and says what is wanted.
        TypeError: a value is of the wrong kind.
    """

    threshold: float = 6.0
    skip: tuple[str, ...] = ("lm_head",)
    activation: Activation = "dynamic"
    activation_group: int | None = 128
    per_token_outliers: bool = False
    outlier_weights: OutlierWeights = "int8"
    outlier_columns: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    out_dtype: torch.dtype | None = None
    backend: str = "auto"

    # The method's name in transformers; with it an Int8Config can be given to from_pretrained as it is.
    quant_method: ClassVar[str] = "eff_int8"

    def __post_init__(self) -> None:
        _check_number("threshold", self.threshold)
        check_patterns(self, "skip")
        check_choice("activation", self.activation, get_args(Activation))
        _check_group(self.activation_group)
        check_choice("outlier_weights", self.outlier_weights, get_args(OutlierWeights))
        check_choice("backend", self.backend, BACKENDS)
        check_out_dtype(self.out_dtype)
        columns = {name: _check_columns(name, c) for name, c in self.outlier_columns.items()}
        object.__setattr__(self, "outlier_columns", columns)
        self._check_combinations()

    def _check_combinations(self) -> None:
        if bool(self.outlier_columns) != (self.outlier_weights == "original"):
            raise ValueError(
                f"outlier_weights={self.outlier_weights!r} with columns of {len(self.outlier_columns)} modules; "
                "'original' needs outlier_columns, which outlier_report(model, batches).static_columns() finds, "
                "and 'int8' takes none"
            )
        if self.activation == "none" and (self.per_token_outliers or self.outlier_columns):
            raise ValueError(
                "activation='none' leaves activations unquantised, so there are no outliers to treat; "
                "leave out per_token_outliers and outlier_columns, or use activation='dynamic'"
            )
        if self.per_token_outliers and self.threshold == 0:
            raise ValueError("per_token_outliers=True needs a threshold above 0, got threshold=0")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types, with the format version and the method's name."""
        return to_json(self, VERSION)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Int8Config:
        """Rebuild the settings from `to_dict`.

        Raises:
            ValueError: another method's settings, a version that this code does not know, or an unknown entry.
        """
        arguments, version = from_json(cls, values, VERSION)
        if version == 1:
            arguments["activation_group"] = None
        return cls(**arguments)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}; use a number, 0 or more")
    if math.isnan(value) or value < 0:
        raise ValueError(f"{name}={value!r}; use 0 (no decomposition) or more")


def _check_group(group: object) -> None:
    if group is None:
        return
    if isinstance(group, bool) or not isinstance(group, int):
        raise TypeError(f"activation_group={group!r}; use a number of columns or None")
    if group < 1 or group % 32:
        raise ValueError(f"activation_group={group}; use a positive multiple of 32, or None for the whole row")


def _check_columns(name: str, columns: Any) -> tuple[int, ...]:
    columns = tuple(int(c) for c in columns)
    if not columns or columns[0] < 0 or any(a >= b for a, b in pairwise(columns)):
        raise ValueError(f"outlier_columns[{name!r}]={columns}; use rising column numbers from 0, at least one")
    return columns

"""The settings of LLM.int8(): one frozen dataclass that checks itself and travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch

from eff_quant.settings import Backend, MethodSettings, check_out_dtype

Activation = Literal["dynamic", "none"]
OutlierWeights = Literal["int8", "original"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Config(MethodSettings):
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
    backend: Backend = "auto"

    # The method's name in transformers; with it an Int8Config can be given to from_pretrained as it is.
    quant_method: ClassVar[str] = "eff_int8"

    # Version 2 added activation_group; settings of version 1 mean one scale for the whole row.
    version: ClassVar[int] = 2

    def check(self) -> None:
        """See the class."""
        if not self.threshold >= 0:
            raise ValueError(f"threshold={self.threshold}; use 0 (no decomposition) or more")
        group = self.activation_group
        if group is not None and (group < 1 or group % 32):
            raise ValueError(f"activation_group={group}; use a positive multiple of 32, or None for the whole row")
        check_out_dtype(self.out_dtype)
        for name, columns in self.outlier_columns.items():
            if not columns or columns[0] < 0 or any(a >= b for a, b in pairwise(columns)):
                raise ValueError(f"outlier_columns[{name!r}]={columns}; use rising column numbers from 0, at least one")
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

    @classmethod
    def upgrade(cls, values: dict[str, Any], version: int) -> dict[str, Any]:
        """See ``version``."""
        return {**values, "activation_group": None}

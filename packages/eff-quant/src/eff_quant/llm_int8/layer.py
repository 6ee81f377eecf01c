"""A linear layer with int8 weights: the module that LLM.int8() puts where an `nn.Linear` was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from eff_kernels import int8_linear
from torch import Tensor, nn

from eff_quant.layer import QuantizedLinear, StackedCodes, check_entry
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.weight import dequantize_weight, quantize_weight

ROW_FORMAT = 0


class Int8Linear(QuantizedLinear):
    """Linear layer y = x @ W.T + bias with W in int8, one scale per output row.

    It is an `nn.Linear`, so that PEFT, accelerate and hooks find it, but its weight is a buffer and gets no gradient;
    the input and the bias do (the gradient to x uses the dequantised weight, straight through the rounding of x).

    The state dict is that of bitsandbytes: ``weight`` int8 [N, K], ``SCB`` float32 [N] (the largest absolute weight of
    each row), ``weight_format`` uint8 scalar (0: row-major), ``bias``. Layers with static outlier columns add
    ``outlier_columns`` int64 [n] and ``outlier_weight`` [N, n]. Moving or casting the layer never quantises anything:
    ``.to(torch.bfloat16)`` leaves codes and scales as they are and casts the rest.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        config: Settings; threshold, activation, activation_group, per_token_outliers, out_dtype and backend act
            here.
        num_outlier_columns: Room for this many static outlier columns.
        device, dtype: Of bias and outlier columns; the weight is int8 whatever the dtype.

    A fresh layer holds zeros; `from_linear` or `load_state_dict` fill it.
    """

    config_class = Int8Config
    stored_as = {"codes": "weight"}  # noqa: RUF012
    follow_casts = frozenset({"outlier_weight"})

    codes: Tensor
    SCB: Tensor
    weight_format: Tensor
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def empty_tensors(  # type: ignore[override]
        self, device: torch.device | str | None, outlier_columns: Sequence[int] = ()
    ) -> dict[str, Tensor | None]:
        """Zeros; buffers of outlier columns where there are some."""
        n, k = self.out_features, self.in_features
        columns = weight = None
        if outlier_columns:
            _check_columns(outlier_columns, k)
            columns = torch.zeros(len(outlier_columns), dtype=torch.int64, device=device)
            weight = torch.zeros(n, len(outlier_columns), device=device, dtype=self.dtype)
        return {
            "codes": torch.zeros(n, k, dtype=torch.int8, device=device),
            "SCB": torch.zeros(n, dtype=torch.float32, device=device),
            "weight_format": torch.tensor(ROW_FORMAT, dtype=torch.uint8, device=device),
            "outlier_columns": columns,
            "outlier_weight": weight,
        }

    @classmethod
    def quantized_tensors(  # type: ignore[override]
        cls, weight: Tensor, config: Any = None, *, outlier_columns: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        """The buffers, by name, that hold ``weight`` [N, K].

        Args:
            weight: Left as it was.
            config: Plays no part.
            outlier_columns: Columns whose weights are also kept in the original dtype and which never enter the int8
                product.

        Raises:
            ValueError: a column number is not in the layer, or the weight holds inf or NaN.
        """
        _check_columns(outlier_columns, weight.shape[1])
        codes, absmax = quantize_weight(weight)
        tensors = {
            "codes": codes,
            "SCB": absmax,
            "weight_format": torch.tensor(ROW_FORMAT, dtype=torch.uint8, device=weight.device),
        }
        if outlier_columns:
            columns = torch.tensor(tuple(outlier_columns), dtype=torch.int64, device=weight.device)
            tensors["outlier_columns"] = columns
            tensors["outlier_weight"] = weight.detach().index_select(1, columns)
        return tensors

    def requantized_tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """With the same outlier columns, in their dtype."""
        columns = () if self.outlier_columns is None else self.outlier_columns.tolist()
        tensors = self.quantized_tensors(weight, outlier_columns=columns)
        if self.outlier_weight is not None:
            tensors["outlier_weight"] = tensors["outlier_weight"].to(self.outlier_weight.dtype)
        return tensors

    def forward(self, input: Tensor) -> Tensor:
        """Return x @ W.T + bias for an input x [..., K]: int8 product, outlier columns apart (paper, section 3)."""
        if self.outlier_columns is None or self.outlier_weight is None:
            return self._int8(input)
        # The static columns leave the int8 product by being zero in it, so they do not enlarge the rows' scales either.
        inside = self._int8(input.index_fill(-1, self.outlier_columns, 0))
        outside = nn.functional.linear(
            input.index_select(-1, self.outlier_columns), self.outlier_weight.to(input.dtype)
        )
        return inside + outside.to(inside.dtype)

    def _int8(self, x: Tensor) -> Tensor:
        return self.multiply(x, self._buffers, self.bias, self.config)

    @staticmethod
    def multiply(x: Tensor, tensors: Mapping[str, Any], bias: Tensor | None, config: Int8Config) -> Tensor:
        """Without static outlier columns."""
        return int8_linear(
            x,
            tensors["codes"],
            tensors["SCB"],
            bias,
            threshold=config.threshold if config.activation == "dynamic" else 0.0,
            per_token_outliers=config.per_token_outliers,
            activation=config.activation,
            activation_group=config.activation_group if config.activation == "dynamic" else None,
            out_dtype=config.out_dtype,
            backend=config.backend,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for: codes * SCB / 127, static columns as they were."""
        weight = self.decode(self._buffers, self.config, dtype)
        if self.outlier_columns is not None and self.outlier_weight is not None:
            weight[:, self.outlier_columns] = self.outlier_weight.to(dtype)
        return weight

    @staticmethod
    def stacked(tensors: Mapping[str, Any], config: Int8Config) -> StackedCodes | None:
        """Rounded as `multiply` rounds."""
        rounding = {
            "threshold": config.threshold,
            "per_token": config.per_token_outliers,
            "group": config.activation_group,
        }
        return StackedCodes(
            format="int8",
            codes=tensors["codes"],
            scale=tensors["SCB"] / 127,
            rounding=rounding if config.activation == "dynamic" else None,
        )

    @staticmethod
    def decode(tensors: Mapping[str, Any], config: Int8Config, dtype: torch.dtype) -> Tensor:
        """Without static outlier columns."""
        return dequantize_weight(tensors["codes"], tensors["SCB"], dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        columns = 0 if self.outlier_columns is None else len(self.outlier_columns)
        text = f"{super().extra_repr()}, threshold={self.config.threshold}, activation={self.config.activation!r}"
        if self.config.activation == "dynamic":
            text += f", activation_group={self.config.activation_group}"
        return text + (f", outlier_columns={columns}" if columns else "")

    def check_entries(self, name: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``weight_format`` may be missing; outlier columns become as many as the checkpoint holds."""
        if "weight" not in entries:
            raise KeyError(f"{name}: the checkpoint holds it quantised, but has no weight")
        weight = entries["weight"]
        if weight.dtype != torch.int8:
            raise TypeError(f"{name}: weight has dtype {weight.dtype}, wanted int8; quantise after loading instead")
        check_int8_entry(f"{name}.", has_scales="SCB" in entries, weight_format=entries.get("weight_format"))
        checked = {}
        for leaf, like in (("weight", self.codes), ("SCB", self.SCB)):
            checked[leaf] = entries[leaf]
            check_entry(name, leaf, entries[leaf], like)
        checked["weight_format"] = torch.tensor(ROW_FORMAT, dtype=torch.uint8)
        kept = entries.get("outlier_weight")
        if kept is not None:
            n = kept.shape[-1]
            if kept.ndim != 2 or len(kept) != self.out_features or entries["outlier_columns"].shape != (n,):
                raise ValueError(
                    f"{name}: outlier_weight has shape {list(kept.shape)}, wanted [{self.out_features}, n]"
                )
            if self.outlier_weight is None or self.outlier_weight.shape != kept.shape:
                self.outlier_weight = torch.zeros(kept.shape, dtype=kept.dtype, device=self.device)
                self.outlier_columns = torch.zeros(n, dtype=torch.int64, device=self.device)
            checked |= {leaf: entries[leaf] for leaf in ("outlier_columns", "outlier_weight")}
        return checked

    def after_loading(self) -> None:
        """Old files have no ``weight_format``, which then is row-major."""
        self.register_buffer("weight_format", torch.tensor(ROW_FORMAT, dtype=torch.uint8, device=self.device))


def _check_columns(columns: Sequence[int], in_features: int) -> None:
    if columns and max(columns) >= in_features:
        raise ValueError(f"outlier column {max(columns)} is not in a layer of in_features={in_features}")


def check_int8_entry(prefix: str, *, has_scales: bool, weight_format: Tensor | str | int | None) -> None:
    """Check the entries ``prefix + ...`` of a checkpoint that holds an int8 layer.

    Raises:
        KeyError: there is no ``SCB``; the message names the module.
        ValueError: ``weight_format`` is not row-major (0 or ``"row"``; None, an old file without it, means row-major).
    """
    name = prefix.removesuffix(".") or "the layer"
    if not has_scales:
        raise KeyError(f"{name}: int8 weight without its scales {prefix}SCB")
    found: Any = weight_format
    if isinstance(weight_format, Tensor):
        found = None if weight_format.is_meta else weight_format.item()
    if found not in (None, ROW_FORMAT, "row"):
        raise ValueError(f"{name}: weight_format={found!r} is a tiled layout; only 0 or 'row' (row-major) is supported")

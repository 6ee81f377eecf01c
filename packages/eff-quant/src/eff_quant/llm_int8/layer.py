"""A linear layer with int8 weights: the module that LLM.int8() puts where an `nn.Linear` was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from eff_kernels import int8_linear
from torch import Tensor, nn

from eff_quant.buffers import as_integers
from eff_quant.linears import is_conv1d, linear_weight
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.weight import dequantize_weight, quantize_weight

ROW_FORMAT = 0


class Int8Linear(nn.Linear):
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

    SCB: Tensor
    weight_format: Tensor
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: Int8Config | None = None,
        *,
        num_outlier_columns: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate a float weight
        self.in_features = in_features
        self.out_features = out_features
        self.config = config or Int8Config()
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("SCB", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.register_buffer("weight_format", torch.tensor(ROW_FORMAT, dtype=torch.uint8, device=device))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )
        self._make_outlier_buffers(num_outlier_columns, device, dtype)

    def _make_outlier_buffers(self, n: int, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        columns = torch.zeros(n, dtype=torch.int64, device=device) if n else None
        weight = torch.zeros(self.out_features, n, device=device, dtype=dtype) if n else None
        self.register_buffer("outlier_columns", columns)
        self.register_buffer("outlier_weight", weight)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: Int8Config | None = None, *, outlier_columns: Sequence[int] = ()
    ) -> Int8Linear:
        """Quantise a layer; it is left as it was, and the bias is shared with it.

        Args:
            linear: An `nn.Linear`, or GPT-2's ``Conv1D``, whose weight is [K, N] and gets transposed.
            config: Settings of the new layer.
            outlier_columns: Columns whose weights are also kept in the original dtype and which never enter the int8
                product.

        Raises:
            TypeError: neither an `nn.Linear` nor a ``Conv1D``.
            ValueError: a column number is not in the layer, or the weight holds inf or NaN.
        """
        if isinstance(linear, cls) or not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
            raise TypeError(f"cannot quantise a {type(linear).__name__}; use nn.Linear or transformers' Conv1D")
        weight = linear_weight(linear)
        new = cls.empty_like(linear, config, outlier_columns=outlier_columns, device="meta")
        new.fill(weight, outlier_columns)
        new.bias = linear.bias  # type: ignore[assignment]
        return new.train(linear.training)

    @classmethod
    def empty_like(
        cls,
        linear: nn.Module,
        config: Int8Config | None = None,
        *,
        outlier_columns: Sequence[int] = (),
        device: torch.device | str | None = None,
    ) -> Int8Linear:
        """An unfilled layer of the shape of an `nn.Linear` or ``Conv1D``, on the same device unless one is named."""
        weight = linear_weight(linear)
        out_features, in_features = weight.shape
        if outlier_columns and max(outlier_columns) >= in_features:
            raise ValueError(f"outlier column {max(outlier_columns)} is not in a layer of in_features={in_features}")
        return cls(
            in_features,
            out_features,
            linear.bias is not None,
            config,
            num_outlier_columns=len(outlier_columns),
            device=device or weight.device,
            dtype=weight.dtype,
        )

    def fill(self, weight: Tensor, outlier_columns: Sequence[int] = ()) -> None:
        """Quantise ``weight`` [N, K] into this layer, on the weight's device."""
        for name, value in self.quantized_tensors(weight, outlier_columns).items():
            setattr(self, name, value)

    @staticmethod
    def quantized_tensors(weight: Tensor, outlier_columns: Sequence[int] = ()) -> dict[str, Tensor]:
        """The buffers, by their names in the state dict, that hold ``weight`` [N, K]."""
        codes, absmax = quantize_weight(weight)
        tensors = {
            "weight": codes,
            "SCB": absmax,
            "weight_format": torch.tensor(ROW_FORMAT, dtype=torch.uint8, device=weight.device),
        }
        if outlier_columns:
            columns = torch.tensor(tuple(outlier_columns), dtype=torch.int64, device=weight.device)
            tensors["outlier_columns"] = columns
            tensors["outlier_weight"] = weight.detach().index_select(1, columns)
        return tensors

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ W.T + bias for x [..., K]: int8 product, outlier columns apart (section 3 of the paper)."""
        if self.outlier_columns is None or self.outlier_weight is None:
            return self._int8(x)
        # The static columns leave the int8 product by being zero in it, so they do not enlarge the rows' scales either.
        inside = self._int8(x.index_fill(-1, self.outlier_columns, 0))
        outside = nn.functional.linear(x.index_select(-1, self.outlier_columns), self.outlier_weight.to(x.dtype))
        return inside + outside.to(inside.dtype)

    def _int8(self, x: Tensor) -> Tensor:
        config = self.config
        return int8_linear(
            x,
            self.weight,
            self.SCB,
            self.bias,
            threshold=config.threshold if config.activation == "dynamic" else 0.0,
            per_token_outliers=config.per_token_outliers,
            activation=config.activation,
            activation_group=config.activation_group if config.activation == "dynamic" else None,
            out_dtype=config.out_dtype,
            backend=config.backend,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for: codes * SCB / 127, static columns as they were."""
        weight = dequantize_weight(self.weight, self.SCB, dtype)
        if self.outlier_columns is not None and self.outlier_weight is not None:
            weight[:, self.outlier_columns] = self.outlier_weight.to(dtype)
        return weight

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """Return an `nn.Linear` with the dequantised weight; the bias is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dequantize(dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        columns = 0 if self.outlier_columns is None else len(self.outlier_columns)
        text = f"{super().extra_repr()}, threshold={self.config.threshold}, activation={self.config.activation!r}"
        if self.config.activation == "dynamic":
            text += f", activation_group={self.config.activation_group}"
        return text + (f", outlier_columns={columns}" if columns else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        dtype = fn(torch.empty(0, dtype=torch.int8, device=self.weight.device)).dtype
        if dtype != torch.int8:
            raise TypeError(f"int8 weights cannot be cast to {dtype}; use dequantize_(model) for float weights")
        with as_integers(self, ["SCB"]):  # not the original weights of outlier columns, which follow a cast
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None:
            if weight.dtype != torch.int8:
                name = prefix.removesuffix(".") or "the layer"
                raise TypeError(f"{name}: weight has dtype {weight.dtype}, wanted int8; quantise after loading instead")
            check_int8_entry(
                prefix, has_scales=prefix + "SCB" in state_dict, weight_format=state_dict.get(prefix + "weight_format")
            )
            state_dict[prefix + "weight_format"] = torch.tensor(ROW_FORMAT, dtype=torch.uint8)
            kept = state_dict.get(prefix + "outlier_weight")
            if kept is not None and (self.outlier_weight is None or self.outlier_weight.shape != kept.shape):
                self._make_outlier_buffers(kept.shape[1], self.weight.device, kept.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


def check_int8_entry(prefix: str, *, has_scales: bool, weight_format: Tensor | str | int | None) -> None:
    """Check the entries ``prefix + ...`` of a checkpoint that holds an int8 layer.

    Raises:
        KeyError: there is no ``SCB``; the message names the module.
        ValueError: ``weight_format`` is not row-major (0 or ``"row"``; None, an old file without it, means row-major).
    """
    name = prefix.removesuffix(".") or "the layer"
    if not has_scales:
        raise KeyError(f"{name}: int8 weight without its scales {prefix}SCB")
    found = weight_format.item() if isinstance(weight_format, Tensor) else weight_format
    if found not in (None, ROW_FORMAT, "row"):
        raise ValueError(f"{name}: weight_format={found!r} is a tiled layout; only 0 or 'row' (row-major) is supported")

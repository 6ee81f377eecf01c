"""Linear layers of vLLM on eff's kernels."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels import fp4_linear, int8_linear
from eff_quant import FP4Config, Int8Config
from eff_quant.fp4 import weight as fp4
from eff_quant.llm_int8 import weight as int8
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.parameter import ModelWeightParameter, _ColumnvLLMParameter
from vllm.model_executor.utils import set_weight_attrs


class _ScaleParameter(_ColumnvLLMParameter):
    """A number for each row of a weight, cut like its rows; a layer that is cut by columns has them whole."""

    def load_row_parallel_weight(self, loaded_weight: Tensor, **_: Any) -> None:
        """Take all of it."""
        self.data.copy_(loaded_weight.view_as(self.data))


def multiply(x: Tensor, layer: nn.Module, bias: Tensor | None, config: Int8Config) -> Tensor:
    """LLM.int8() with a layer's codes ``weight`` [N, K] and ``SCB`` [N].

    Outliers are looked for in each row by itself, also where the settings ask for columns of the whole call, so that an
    answer does not depend on what else vLLM has in its batch.
    """
    if config.activation == "none":
        return int8_linear(x, layer.weight, layer.SCB, bias, activation="none")
    return int8_linear(
        x, layer.weight, layer.SCB, bias, threshold=config.threshold, per_token_outliers=config.threshold > 0,
        activation_group=config.activation_group,
    )  # fmt: skip


class Int8Method(UnquantizedLinearMethod):
    """Loads floats, then keeps int8 alone."""

    supports_pre_processed_weights = False

    def __init__(self, config: Int8Config) -> None:
        super().__init__()
        self.config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantise; rows are independent, so that a fused layer has the codes of its parts."""
        codes, absmax = int8.quantize_weight(layer.weight.data)
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.SCB = nn.Parameter(absmax, requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X [..., K] to [..., N]."""
        return multiply(x, layer, bias, self.config)


class StoredInt8Method(LinearMethodBase):
    """Reads ``weight`` int8 and ``SCB``, as eff-quant saves them."""

    def __init__(self, config: Int8Config) -> None:
        self.config = config

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """See `LinearMethodBase.create_weights`."""
        loader, rows = extra_weight_attrs.pop("weight_loader"), sum(output_partition_sizes)
        codes = torch.empty(rows, input_size_per_partition, dtype=torch.int8)
        weight = ModelWeightParameter(data=codes, input_dim=1, output_dim=0, weight_loader=loader)
        scale = _ScaleParameter(data=torch.empty(rows), output_dim=0, weight_loader=loader)
        for name, parameter in (("weight", weight), ("SCB", scale)):
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, extra_weight_attrs)
        # bitsandbytes' mark of a layout, which nothing needs: codes are row-major.
        mark = nn.Parameter(torch.empty((), dtype=torch.uint8), requires_grad=False)
        layer.register_parameter("weight_format", mark)
        set_weight_attrs(mark, {"weight_loader": lambda *_: None})

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Plain parameters are enough from here on."""
        del layer.weight_format
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        layer.SCB = nn.Parameter(layer.SCB.data, requires_grad=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X [..., K] to [..., N]."""
        return multiply(x, layer, bias, self.config)


class FP4Method(UnquantizedLinearMethod):
    """Loads floats, then keeps FP4 codes alone."""

    supports_pre_processed_weights = False

    def __init__(self, config: FP4Config) -> None:
        super().__init__()
        self.config = config

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Quantise; the parts of a fused layer share one scale of the whole, as eff-quant's groups do."""
        codes = fp4.quantize_weight(layer.weight.data, self.config).codes
        del layer.weight
        for name, tensor in zip(("packed", "scale", "whole"), codes, strict=True):
            layer.register_buffer(f"fp4_{name}", tensor, persistent=False)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X [..., K] to [..., N]."""
        return fp4_linear(x, layer.fp4_packed, layer.fp4_scale, layer.fp4_whole, bias, format=self.config.format)

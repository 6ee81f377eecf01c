"""Linear layers of the decoder whose weights are codes; each knows how to make, read and stack itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels import FP4Codes, fp4_linear, fp8_linear, fp8_quantize, int8_linear
from eff_kernels.ops.group_linear import GROUP
from eff_quant import FP4Config, FP8Config, Int8Config
from eff_quant.fp4 import weight as fp4
from eff_quant.llm_int8 import weight as int8
from torch import Tensor

from eff_serve.engine.gguf.model import GGUFModel
from eff_serve.engine.groups import GroupConfig, GroupLinear
from eff_serve.engine.linear import FloatLinear, Linear, Separate, stack_biases
from eff_serve.engine.weights import Checkpoint, CheckpointError


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """LLM.int8(). Outliers are taken out token by token."""

    weight: Tensor
    absmax: Tensor
    bias: Tensor | None
    config: Int8Config

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        c = self.config
        if c.activation == "none":
            return int8_linear(x, self.weight, self.absmax, self.bias, activation="none")
        return int8_linear(
            x, self.weight, self.absmax, self.bias, threshold=c.threshold, per_token_outliers=c.threshold > 0,
            activation_group=c.activation_group,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight.nbytes + self.absmax.nbytes

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, config: Int8Config) -> Int8Linear:
        """From a float weight [N, K]."""
        return cls(*int8.quantize_weight(weight), bias, config)

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str, n: int, k: int, bias: Tensor | None, config: Any) -> Int8Linear:
        """From ``weight`` int8 and ``SCB``, the layout of bitsandbytes."""
        layout = f"{name}.weight_format"
        if layout in checkpoint and (kind := int(checkpoint.get(layout, ()))) != 0:
            raise CheckpointError(f"{layout} must be 0 (row-major), got {kind}: weights in a GPU's order")
        return cls(checkpoint.get(f"{name}.weight", (n, k)), checkpoint.floats(f"{name}.SCB", (n,)), bias, config)

    @staticmethod
    def stack(layers: Sequence[Int8Linear]) -> Int8Linear | None:
        """One layer with the outputs of all; scales belong to rows, so no number changes."""
        config = layers[0].config
        if any(layer.config != config for layer in layers):
            return None
        bias = stack_biases([layer.bias for layer in layers], [layer.weight.size(0) for layer in layers])
        return Int8Linear(
            torch.cat([layer.weight for layer in layers]), torch.cat([layer.absmax for layer in layers]), bias, config
        )


@dataclass(frozen=True, slots=True)
class FP4Linear:
    """NVFP4 or MXFP4, two codes a byte."""

    codes: FP4Codes
    bias: Tensor | None
    config: FP4Config
    input_global_scale: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        c = self.config
        if c.activations is None:
            return fp4_linear(x, *self.codes, self.bias, format=c.format)
        return fp4_linear(
            x, *self.codes, self.bias, format=c.format, activations="dynamic", scale_rounding=c.scale_rounding,
            input_global_scale=self.input_global_scale,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and their scales."""
        return self.codes.packed.nbytes + self.codes.scale.nbytes

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, config: FP4Config) -> FP4Linear:
        """From a float weight [N, K]."""
        return cls(fp4.quantize_weight(weight, config).codes, bias, config)

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str, n: int, k: int, bias: Tensor | None, config: Any) -> FP4Linear:
        """From ``weight_packed`` and its scales, the layout of compressed-tensors."""
        block, dtype = (16, torch.float8_e4m3fn) if config.format == "nvfp4" else (32, torch.uint8)
        packed, scale = checkpoint.get(f"{name}.weight_packed", (n, k // 2)), f"{name}.weight_scale"
        scales = checkpoint.get(scale, (n, k // block))
        if scales.dtype != dtype:
            raise CheckpointError(f"{scale} of {config.format} must be {dtype}, got {scales.dtype}")
        whole = of_input = None
        if config.format == "nvfp4":  # files hold the reciprocals of global scales
            whole = 1 / checkpoint.floats(f"{name}.weight_global_scale", (1,))[0]
        if config.activations == "static":
            of_input = 1 / checkpoint.floats(f"{name}.input_global_scale", (1,))[0]
        return cls(FP4Codes(packed, scales, whole), bias, config, of_input)

    @staticmethod
    def stack(layers: Sequence[FP4Linear]) -> FP4Linear | None:
        """One layer with the outputs of all, if they share their global scales."""
        first = layers[0]
        for other in layers[1:]:
            pairs = (
                (first.codes.global_scale, other.codes.global_scale),
                (first.input_global_scale, other.input_global_scale),
            )
            if other.config != first.config or any(a is not None and b is not None and a != b for a, b in pairs):
                return None
        packed = torch.cat([layer.codes.packed for layer in layers])
        scale = torch.cat([layer.codes.scale.view(torch.uint8) for layer in layers]).view(first.codes.scale.dtype)
        bias = stack_biases([layer.bias for layer in layers], [layer.codes.packed.size(0) for layer in layers])
        codes = FP4Codes(packed, scale, first.codes.global_scale)
        return FP4Linear(codes, bias, first.config, first.input_global_scale)


@dataclass(frozen=True, slots=True)
class FP8Linear:
    """FP8 with a scale for each row."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    config: FP8Config

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return fp8_linear(x, self.weight, self.scale, self.bias, activations=self.config.activations)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        return self.weight.nbytes + self.scale.nbytes

    @classmethod
    def quantize(cls, weight: Tensor, bias: Tensor | None, config: FP8Config) -> FP8Linear:
        """From a float weight [N, K]."""
        codes, scale = fp8_quantize(weight, dtype=config.torch_dtype, power_of_two=config.power_of_two)
        return cls(codes, scale, bias, config)

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str, n: int, k: int, bias: Tensor | None, config: Any) -> FP8Linear:
        """From ``weight`` float8 and ``weight_scale`` [N, 1], the layout of compressed-tensors."""
        scale = checkpoint.floats(f"{name}.weight_scale", (n, 1))[:, 0].contiguous()
        return cls(checkpoint.get(f"{name}.weight", (n, k)), scale, bias, config)

    @staticmethod
    def stack(layers: Sequence[FP8Linear]) -> FP8Linear | None:
        """One layer with the outputs of all; scales belong to rows, so no number changes."""
        first = layers[0]
        if any(layer.config != first.config or layer.weight.dtype != first.weight.dtype for layer in layers):
            return None
        weight = torch.cat([layer.weight.view(torch.uint8) for layer in layers]).view(first.weight.dtype)
        bias = stack_biases([layer.bias for layer in layers], [layer.weight.size(0) for layer in layers])
        return FP8Linear(weight, torch.cat([layer.scale for layer in layers]), bias, first.config)


Quantized = type[Int8Linear] | type[FP4Linear] | type[FP8Linear]
BY_CONFIG: dict[type, Quantized] = {Int8Config: Int8Linear, FP4Config: FP4Linear, FP8Config: FP8Linear}
FROM_FLOATS: dict[type, Any] = {**BY_CONFIG, GroupConfig: GroupLinear}


def load_linear(
    checkpoint: Checkpoint | GGUFModel,
    names: Sequence[str],
    sizes: Sequence[int],
    k: int,
    *,
    stored: Any,
    quantize: Any,
) -> Linear:
    """Read layers that share an input and stack them into one where they allow it, so that one call does all the work.

    Args:
        checkpoint: The folder.
        names: Names of the layers.
        sizes: N of each.
        k: K of all.
        stored: ``stored(name)``: settings with which the folder says that a layer is stored, or None.
        quantize: Settings to quantise float weights with, or None.

    Raises:
        CheckpointError: a tensor is missing, or not what the settings of the folder say.
    """
    layers = [_read(checkpoint, name, n, k, stored(name)) for name, n in zip(names, sizes, strict=True)]
    if len({type(layer) for layer in layers}) > 1:
        return Separate(tuple(layers))
    whole = layers[0] if len(layers) == 1 else _stack(layers)
    if whole is None:
        return Separate(tuple(layers))
    if quantize is not None and isinstance(whole, FloatLinear):
        made: Linear = FROM_FLOATS[type(quantize)].quantize(whole.weight, whole.bias, quantize)
        return made
    return whole


def head_in_bytes(settings: Any, head: Linear) -> Linear | None:
    """A float head in groups of 8 bits where the projections become integers, or None where it stays.

    It is the largest matrix of a small model, read whole for each token. The embedding stays as it is: of that a few
    rows are read.
    """
    integers = isinstance(settings, Int8Config | GroupConfig)
    if not integers or not isinstance(head, FloatLinear) or head.weight.size(1) % GROUP:
        return None
    return GroupLinear.quantize(head.weight, head.bias, GroupConfig(bits=8))


def _stack(layers: Sequence[Any]) -> Linear | None:
    stacked: Linear | None = type(layers[0]).stack(layers)
    return stacked


def _read(checkpoint: Checkpoint | GGUFModel, name: str, n: int, k: int, config: Any) -> Linear:
    bias_name = f"{name}.bias"
    bias = checkpoint.floats(bias_name, (n,)) if bias_name in checkpoint else None
    if (made := checkpoint.layer(name, n, k, bias)) is not None:
        return made
    if isinstance(checkpoint, GGUFModel):  # what is not multiplied as it is stored has become floats
        return FloatLinear(checkpoint.get(f"{name}.weight", (n, k)), bias)
    packed = f"{name}.weight_packed" in checkpoint
    weight = None if packed else checkpoint.get(f"{name}.weight", (n, k))
    if weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1:
        return FloatLinear(weight, bias)
    kind: Quantized = FP4Linear if weight is None else Int8Linear if weight.dtype == torch.int8 else FP8Linear
    if BY_CONFIG.get(type(config)) is not kind:
        held = "FP4" if weight is None else str(weight.dtype)
        raise CheckpointError(f"{name} is stored in {held}, but its settings are {config or 'absent'}")
    return kind.read(checkpoint, name, n, k, bias, config)

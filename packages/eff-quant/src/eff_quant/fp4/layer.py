"""A linear layer with FP4 weights, which stay packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from eff_kernels import FP4Codes, fp4_linear
from torch import Tensor

from eff_quant.fp4.check import check_fp4_tensors
from eff_quant.fp4.config import FP4Config
from eff_quant.fp4.weight import FP4Weight, dequantize_weight, empty_weight, quantize_weight, shape_refusal
from eff_quant.layer import QuantizedLinear, StackedCodes


class FP4Linear(QuantizedLinear):
    """Linear layer y = x @ W.T + bias with W in NVFP4 or MXFP4, 4.5 or 4.25 bits a weight.

    It is an `nn.Linear`, so that PEFT, accelerate and hooks find it, but its weight is in buffers and gets no gradient;
    the input and the bias do (the gradient to x uses the dequantised weight, straight through the rounding of x).

    The state dict is that of compressed-tensors: ``weight_packed`` uint8 [N, K/2] (low nibble: even column),
    ``weight_scale`` float8_e4m3fn [N, K/16] (nvfp4) or uint8 [N, K/32] (mxfp4), ``weight_global_scale`` float32 [1]
    (nvfp4; the reciprocal of what multiplies the codes), ``input_global_scale`` float32 [1] (static activations, also a
    reciprocal), ``bias``. Moving or casting the layer never quantises anything: ``.to(torch.bfloat16)`` leaves codes
    and scales as they are and casts the bias.

    Args:
        in_features: K, a multiple of the block (16 or 32).
        out_features: N.
        bias: Whether there is a bias.
        config: Settings; format, activations, out_dtype and backend act here.
        device: Of all tensors.
        dtype: Of the bias, and of `weight`.

    A fresh layer holds zeros; `from_linear` or `load_state_dict` fill it.

    Raises:
        ValueError: in_features is not a multiple of the block.
    """

    config_class = FP4Config

    weight_packed: Tensor
    weight_scale: Tensor
    weight_global_scale: Tensor | None
    input_global_scale: Tensor | None

    def empty_tensors(self, device: torch.device | str | None, **more: Any) -> dict[str, Tensor | None]:
        """Zeros; the scale of static activations is NaN until it is calibrated."""
        if reason := shape_refusal(self.in_features, self.config.format):
            raise ValueError(reason)
        self._calibrated = False
        packed, scale, reciprocal = empty_weight(self.out_features, self.in_features, self.config.format, device)
        static = self.config.activations == "static"
        return {
            "weight_packed": packed,
            "weight_scale": scale,
            "weight_global_scale": reciprocal,
            "input_global_scale": torch.full((1,), torch.nan, dtype=torch.float32, device=device) if static else None,
        }

    @classmethod
    def quantized_tensors(  # type: ignore[override]
        cls, weight: Tensor, config: FP4Config, *, reciprocal: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The buffers, by name, that hold ``weight`` [N, K].

        Args:
            weight: Left as it was.
            config: Settings.
            reciprocal: The tensor scale in the convention of files, where a group of layers shares one (see
                `shared_reciprocal_scale`).

        Returns:
            With static activations the input's scale is NaN until it is calibrated.

        Raises:
            ValueError: in_features is not a multiple of the block, or the weight holds inf or NaN.
        """
        packed, scale, reciprocal = quantize_weight(weight, config, reciprocal=reciprocal)
        tensors = {"weight_packed": packed, "weight_scale": scale}
        if reciprocal is not None:
            tensors["weight_global_scale"] = reciprocal
        if config.activations == "static":
            tensors["input_global_scale"] = torch.full((1,), torch.nan, dtype=torch.float32, device=weight.device)
        return tensors

    def requantized_tensors(self, weight: Tensor) -> dict[str, Tensor]:
        """With the same scale of the input."""
        tensors = self.quantized_tensors(weight, self.config)
        tensors.pop("input_global_scale", None)
        return tensors

    @property
    def codes(self) -> FP4Codes:
        """The weight as the ops of eff_kernels take it; its tensor scale multiplies."""
        return FP4Weight(self.weight_packed, self.weight_scale, self.weight_global_scale).codes

    def forward(self, input: Tensor) -> Tensor:
        """Return x @ W.T + bias for an input x [..., K].

        Raises:
            RuntimeError: static activations without a calibrated scale (compiled: the result is NaN).
        """
        config = self.config
        if config.activations == "static" and not self._calibrated and not torch.compiler.is_compiling():
            self._check_calibrated()
        return self.multiply(input, self._buffers, self.bias, config)

    @staticmethod
    def multiply(x: Tensor, tensors: Mapping[str, Any], bias: Tensor | None, config: FP4Config) -> Tensor:
        """As `forward`, without a look at the scale of the input."""
        weight_scale, input_scale = tensors.get("weight_global_scale"), tensors.get("input_global_scale")
        rounding: dict[str, Any] = {}
        if config.activations is not None:
            rounding = {
                "activations": "dynamic",
                "input_global_scale": None if input_scale is None else input_scale.reciprocal(),
                "scale_rounding": config.scale_rounding,
            }
        return fp4_linear(
            x,
            tensors["weight_packed"],
            tensors["weight_scale"],
            None if weight_scale is None else weight_scale.reciprocal(),
            bias,
            format=config.format,
            out_dtype=config.out_dtype,
            backend=config.backend,
            **rounding,
        )

    @staticmethod
    def stacked(tensors: Mapping[str, Any], config: FP4Config) -> StackedCodes | None:
        """None where x is rounded too."""
        if config.activations is not None:
            return None
        scale = tensors.get("weight_global_scale")
        return StackedCodes(
            format=config.format,
            codes=tensors["weight_packed"],
            blocks=tensors["weight_scale"].view(torch.uint8),
            scale=None if scale is None else scale.reciprocal().squeeze(-1),
        )

    def _check_calibrated(self) -> None:
        scale = self.input_global_scale
        if scale is not None and not torch.isfinite(scale).all():
            raise RuntimeError(
                f"FP4Linear({self.extra_repr()}) has no scale for its input yet; "
                "use calibrate_fp4(model, batches).set_input_scales(model)"
            )
        self._calibrated = True

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for."""
        return self.decode(self._buffers, self.config, dtype)

    @staticmethod
    def decode(tensors: Mapping[str, Any], config: FP4Config, dtype: torch.dtype) -> Tensor:
        """As `dequantize`."""
        weight = FP4Weight(tensors["weight_packed"], tensors["weight_scale"], tensors.get("weight_global_scale"))
        return dequantize_weight(weight.codes, config.format, dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        text = f"{super().extra_repr()}, format={self.config.format!r}"
        return text + (f", activations={self.config.activations!r}" if self.config.activations else "")

    def check_entries(self, name: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `check_fp4_tensors`; a static scale of the input that is not there stays as it is."""
        if "weight" in entries and "weight_packed" not in entries:
            raise TypeError(f"{name}: the checkpoint holds a float weight, wanted FP4; quantise after loading instead")
        if "weight_packed" not in entries:
            raise KeyError(f"{name}: the checkpoint holds it quantised, but has no weight_packed")
        shape = (self.out_features, self.in_features)
        checked = check_fp4_tensors(name, entries, self.config.format, shape)
        if self.config.activations == "static" and "input_global_scale" not in checked:
            raise KeyError(f"{name}: no input_global_scale, which static activations need")
        return checked if self.config.activations == "static" else _without_input_scale(checked)


def _without_input_scale(checked: dict[str, Tensor]) -> dict[str, Tensor]:
    return {leaf: t for leaf, t in checked.items() if leaf != "input_global_scale"}

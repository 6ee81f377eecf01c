"""A linear layer with FP8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from eff_kernels import fp8_linear, fp8_quantize
from torch import Tensor

from eff_quant.fp8_qat.config import FP8Config
from eff_quant.layer import QuantizedLinear, StackedCodes

_BLOCK = 2**22  # weights that are quantised at a time


class FP8Linear(QuantizedLinear):
    """Linear layer y = x @ W.T + bias with W in FP8, one scale per output row.

    It is an `nn.Linear`, so that PEFT, accelerate and hooks find it, but its weight is a buffer and gets no gradient;
    the input and the bias do (the gradient to x uses the dequantised weight, straight through the rounding of x).

    The state dict is that of compressed-tensors' format float-quantized: ``weight`` float8 [N, K], ``weight_scale``
    float32 [N, 1], ``bias``. A scale in another float dtype, or one for the whole tensor, is read, too. Moving or
    casting the layer never quantises anything: ``.to(torch.bfloat16)`` leaves codes and scales as they are and casts
    the bias.

    Args:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        config: Settings; activations, dtype, out_dtype and backend act here.
        device: Of all tensors.
        dtype: Of the bias.

    A fresh layer holds zeros; `from_linear` or `load_state_dict` fill it.
    """

    config_class = FP8Config
    stored_as = {"codes": "weight"}  # noqa: RUF012

    codes: Tensor
    weight_scale: Tensor

    def empty_tensors(self, device: torch.device | str | None, **more: Any) -> dict[str, Tensor | None]:
        """Zeros."""
        codes = torch.zeros(self.out_features, self.in_features, dtype=torch.uint8, device=device)
        scale = torch.ones(self.out_features, 1, dtype=torch.float32, device=device)
        return {"codes": codes.view(self.config.torch_dtype), "weight_scale": scale}

    @classmethod
    def quantized_tensors(cls, weight: Tensor, config: FP8Config, **more: Any) -> dict[str, Tensor]:
        """The buffers, by name, that hold ``weight`` [N, K].

        Raises:
            ValueError: the weight holds inf or NaN.
        """
        rows = max(1, _BLOCK // max(1, weight.shape[1]))  # few at a time, for the sake of peak memory
        parts = [
            fp8_quantize(part, dtype=config.torch_dtype, power_of_two=config.power_of_two)
            for part in weight.detach().split(rows)
        ]
        scale = torch.cat([p.scale for p in parts])
        if not scale.is_meta and not scale.isfinite().all():
            row = int((~scale.isfinite()).nonzero()[0])
            raise ValueError(f"weight row {row} holds inf or NaN; FP8 cannot represent it")
        codes = torch.cat([p.codes.view(torch.uint8) for p in parts]).view(config.torch_dtype)
        return {"codes": codes, "weight_scale": scale[:, None]}

    def forward(self, input: Tensor) -> Tensor:
        """Return x @ W.T + bias for an input x [..., K]."""
        return self.multiply(input, self._buffers, self.bias, self.config)

    @staticmethod
    def multiply(x: Tensor, tensors: Mapping[str, Any], bias: Tensor | None, config: FP8Config) -> Tensor:
        """As `forward`."""
        return fp8_linear(
            x,
            tensors["codes"],
            tensors["weight_scale"].view(-1),
            bias,
            activations=config.activations,
            out_dtype=config.out_dtype,
            backend=config.backend,
        )

    @staticmethod
    def stacked(tensors: Mapping[str, Any], config: FP8Config) -> StackedCodes | None:
        """None where x is rounded too."""
        if config.activations != "none":
            return None
        codes = tensors["codes"]
        format = "e5m2" if codes.dtype == torch.float8_e5m2 else "e4m3"
        return StackedCodes(format=format, codes=codes.view(torch.uint8), scale=tensors["weight_scale"].squeeze(-1))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [N, K] that the layer stands for: codes * scale."""
        return self.decode(self._buffers, self.config, dtype)

    @staticmethod
    def decode(tensors: Mapping[str, Any], config: FP8Config, dtype: torch.dtype) -> Tensor:
        """As `dequantize`."""
        return (tensors["codes"].float() * tensors["weight_scale"]).to(dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows between the brackets."""
        return f"{super().extra_repr()}, dtype={self.config.dtype!r}, activations={self.config.activations!r}"

    def check_entries(self, name: str, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scales in another float dtype, or one for the whole tensor, are taken, too."""
        if "weight" not in entries:
            raise KeyError(f"{name}: the checkpoint holds it quantised, but has no weight")
        shape, wanted = (self.out_features, self.in_features), self.config.torch_dtype
        scale = check_fp8_tensors(name, entries["weight"], entries.get("weight_scale"), wanted, shape)
        return {"weight": entries["weight"], "weight_scale": scale}


def check_fp8_tensors(
    name: str, weight: Tensor, scale: Tensor | None, dtype: torch.dtype, shape: tuple[int, int]
) -> Tensor:
    """Check what a checkpoint holds of the layer ``name`` and return its scale as float32 [N, 1].

    Raises:
        TypeError: the weight is not of ``dtype``.
        KeyError: there is no scale.
        ValueError: the shapes are not those of a weight and one scale for each row, or one for all.
    """
    name = name or "the layer"
    if weight.dtype != dtype:
        raise TypeError(f"{name}: weight has dtype {weight.dtype}, wanted {dtype}; quantise after loading instead")
    if scale is None:
        raise KeyError(f"{name}: FP8 weight without its scales weight_scale")
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: weight has shape {list(weight.shape)}, wanted {list(shape)}")
    if scale.numel() != 1 and scale.shape not in ((shape[0],), (shape[0], 1)):
        raise ValueError(
            f"{name}: weight_scale has shape {list(scale.shape)}, wanted [{shape[0]}, 1] or one scale for the tensor"
        )
    return scale.float().reshape(-1, 1).expand(shape[0], 1).contiguous()

"""FP8 as `quantize_` and transformers' loader see it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eff_quant.fp8_qat.config import FP8Config
from eff_quant.fp8_qat.layer import FP8Linear
from eff_quant.method import Method


def _empty(name: str, linear: nn.Module, config: FP8Config, device: torch.device | str | None) -> nn.Module:
    return FP8Linear.empty_like(linear, config, device=device)


def _tensors(name: str, weight: Tensor, config: FP8Config, shared: None) -> dict[str, Tensor]:
    return FP8Linear.quantized_tensors(weight, config)


METHOD = Method(
    config=FP8Config,
    layer=FP8Linear,
    empty=_empty,
    tensors=_tensors,
    bytes_per_weight=lambda config: 1.0,
)

"""FP4 as `quantize_` and transformers' loader see it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eff_quant.fp4.config import FP4Config
from eff_quant.fp4.layer import FP4Linear
from eff_quant.fp4.weight import shape_refusal, shared_reciprocal_scale
from eff_quant.linears import linear_weight
from eff_quant.method import Method


def _empty(name: str, linear: nn.Module, config: FP4Config, device: torch.device | str | None) -> nn.Module:
    return FP4Linear.empty_like(linear, config, device=device)


def _tensors(name: str, weight: Tensor, config: FP4Config, shared: Tensor | None) -> dict[str, Tensor]:
    return FP4Linear.quantized_tensors(weight, config, reciprocal=shared)


def _refuse(linear: nn.Module, config: FP4Config) -> str:
    return shape_refusal(linear_weight(linear).shape[1], config.format)


def _groups(config: FP4Config) -> Sequence[Sequence[str]]:
    return config.fuse_groups if config.format == "nvfp4" else ()


def _share(weights: Sequence[Tensor], config: FP4Config) -> Tensor:
    return shared_reciprocal_scale(weights)


def _rebuild(name: str, linear: nn.Module, old: FP4Linear) -> nn.Module:
    new = FP4Linear.from_linear(linear, old.config)
    new.input_global_scale = old.input_global_scale
    return new


METHOD = Method(
    config=FP4Config,
    layer=FP4Linear,
    empty=_empty,
    tensors=_tensors,
    refuse=_refuse,
    groups=_groups,
    share=_share,
    rebuild=_rebuild,
    bytes_per_weight=lambda config: 0.5 + 1 / config.block,
)

"""FP4 as `quantize_` and the loaders see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eff_quant.fp4.checkpoint import load_fp4_checkpoint
from eff_quant.fp4.config import FP4Config
from eff_quant.fp4.layer import FP4Linear
from eff_quant.fp4.settings import stored_fp4
from eff_quant.fp4.weight import shape_refusal, shared_reciprocal_scale
from eff_quant.hub import packed_formats, refuse_config
from eff_quant.linears import linear_weight
from eff_quant.method import Method
from eff_quant.registry import register


def _refuse(linear: nn.Module, config: FP4Config) -> str:
    return shape_refusal(linear_weight(linear).shape[1], config.format)


def _groups(config: FP4Config) -> Sequence[Sequence[str]]:
    return config.fuse_groups if config.format == "nvfp4" else ()


def _share(weights: Sequence[Tensor], config: FP4Config) -> dict[str, Tensor]:
    return {"reciprocal": shared_reciprocal_scale(weights)}


def _reads(settings: Mapping[str, Any]) -> bool:
    method = settings.get("quant_method")
    packed = any("fp4" in f for f in packed_formats(settings))
    return method in ("modelopt", "modelopt_fp4") or (method == "compressed-tensors" and packed)


def _read(path: Any, config: None = None, **kwargs: Any) -> Any:
    refuse_config(path, config)
    return load_fp4_checkpoint(path, **kwargs)


def _experts(name: str, config: FP4Config) -> str:
    if config.activations == "static":
        return "has activations='static', and stacked experts have no scale of their inputs; use None or 'dynamic'"
    return ""


METHOD = register(
    Method(
        config=FP4Config,
        layer=FP4Linear,
        refuse=_refuse,
        experts=_experts,
        groups=_groups,
        share=_share,
        bytes_per_weight=lambda config: 0.5 + 1 / config.block,
        reads=_reads,
        stored=stored_fp4,
        read=_read,
    )
)

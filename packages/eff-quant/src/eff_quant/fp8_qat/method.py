"""FP8 as `quantize_` and the loaders see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eff_quant.fp8_qat.config import FP8Config
from eff_quant.fp8_qat.files import fp8_config, load_compressed_fp8
from eff_quant.fp8_qat.layer import FP8Linear
from eff_quant.hub import packed_formats, refuse_config
from eff_quant.method import Method
from eff_quant.registry import register


def _read(path: Any, config: None = None, **kwargs: Any) -> Any:
    refuse_config(path, config)
    return load_compressed_fp8(path, **kwargs)


def _reads(settings: Mapping[str, Any]) -> bool:
    """All of compressed-tensors but FP4; what is no FP8 either gets `load_compressed_fp8`'s word on it."""
    packed = any("fp4" in f for f in packed_formats(settings))
    return settings.get("quant_method") == "compressed-tensors" and not packed


METHOD = register(
    Method(
        config=FP8Config,
        layer=FP8Linear,
        experts=lambda name, config: "",
        bytes_per_weight=lambda config: 1.0,
        reads=_reads,
        stored=fp8_config,
        read=_read,
    )
)

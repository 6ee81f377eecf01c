"""eff-quant's settings as vLLM's quantisation configs: which layer gets which method."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from eff_kernels.edit import fits
from eff_quant import FP4Config, Int8Config
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from eff_vllm.linear import FP4Method, Int8Method, StoredInt8Method

__all__ = ["EffFP4", "EffInt8", "register_quantization_config"]


class EffInt8(QuantizationConfig):
    """LLM.int8(): quantises a float folder while loading, or reads one that eff-quant saved.

    Args:
        settings: Those of eff-quant.
        stored: Whether the folder holds codes already.
    """

    name: ClassVar[str] = "eff_int8"

    def __init__(self, settings: Int8Config | None = None, *, stored: bool = False) -> None:
        super().__init__()
        self.settings = settings or Int8Config()
        self.stored = stored
        if self.settings.outlier_columns:
            raise ValueError("outlier_columns are not served through vLLM; quantise without outlier_weights='original'")

    def get_name(self) -> str:
        """The method's name."""
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU; on CPUs vLLM does not ask."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """There are no files beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EffInt8:
        """From the ``quantization_config`` of a folder."""
        return cls(Int8Config.from_dict(config), stored=True)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer, None for what is no linear layer."""
        if not isinstance(layer, LinearBase):
            return None
        if skips(self, layer, prefix):
            return UnquantizedLinearMethod()
        return StoredInt8Method(self.settings) if self.stored else Int8Method(self.settings)


class EffFP4(QuantizationConfig):
    """NVFP4: quantises a float folder while loading.

    Args:
        settings: Those of eff-quant; activations stay as they are.
    """

    name: ClassVar[str] = "eff_fp4"

    def __init__(self, settings: FP4Config | None = None) -> None:
        super().__init__()
        self.settings = settings or FP4Config(format="nvfp4")

    def get_name(self) -> str:
        """The method's name."""
        return self.name

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU; on CPUs vLLM does not ask."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """There are no files beside config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EffFP4:
        """Refuses: vLLM reads FP4 folders by compressed-tensors.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "folders that eff-quant saved in FP4 are not read here; use save_fp4_checkpoint, whose folders vLLM reads"
        )

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of a layer, None for what is no linear layer."""
        if not isinstance(layer, LinearBase):
            return None
        return UnquantizedLinearMethod() if skips(self, layer, prefix) else FP4Method(self.settings)


def skips(config: EffInt8 | EffFP4, layer: nn.Module, prefix: str) -> bool:
    """Whether settings leave a layer as it is; fused layers are asked for by the names of their parts.

    Raises:
        ValueError: the parts of a fused layer disagree.
    """
    parent, _, last = prefix.rpartition(".")
    parts = config.packed_modules_mapping.get(last, [last])
    asked = {part: fits(config.settings.skip, f"{parent}.{part}".lstrip("."), layer) for part in parts}
    if len(set(asked.values())) > 1:
        raise ValueError(f"{prefix} is one layer in vLLM; skip all of {', '.join(parts)} or none, got {asked}")
    return all(asked.values())

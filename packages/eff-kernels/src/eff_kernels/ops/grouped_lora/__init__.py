"""Low-rank updates of many adapters in one batch: each row names the adapters that it takes, with weights."""

from eff_kernels.ops.grouped_lora.api import grouped_lora

__all__ = ["grouped_lora"]

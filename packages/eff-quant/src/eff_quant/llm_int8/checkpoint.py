"""Checking the int8 layers of a safetensors checkpoint before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from eff_quant.llm_int8.layer import check_int8_entry


def check_int8_files(files: Iterable[str | Path]) -> set[str]:
    """Check the int8 layers in safetensors files and return the names of those without a ``weight_format`` entry.

    Only headers and the one-byte formats are read.

    Raises:
        KeyError: an int8 weight has no ``SCB``; the message names the module.
        ValueError: an unsupported ``weight_format``.
    """
    from safetensors import safe_open

    dtypes: dict[str, str] = {}
    formats: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 - a safetensors handle is no dict
                dtypes[key] = f.get_slice(key).get_dtype()
                if key.endswith(".weight_format"):
                    formats[key] = f.get_tensor(key)
    without = set()
    for key, dtype in dtypes.items():
        if key.endswith(".weight") and dtype == "I8":
            prefix = key.removesuffix("weight")
            check_int8_entry(
                prefix, has_scales=prefix + "SCB" in dtypes, weight_format=formats.get(prefix + "weight_format")
            )
            if prefix + "weight_format" not in formats:
                without.add(prefix.removesuffix("."))
    return without

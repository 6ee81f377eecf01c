"""How a folder stores its weights: what the ``quantization_config`` of its config.json says, asked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eff_quant.int4_files import Int4File, int4_settings
from eff_quant.mixed import MixedConfig, as_mixed, settings_from_dict
from eff_quant.registry import METHODS, method_names


def stored_as(settings: Mapping[str, Any] | None) -> MixedConfig | Int4File | None:
    """What an entry ``quantization_config`` means.

    Args:
        settings: The entry; None or empty where there is none.

    Returns:
        Rules by layer for our own formats, bitsandbytes' int8 and FP4 and FP8 of compressed-tensors; the layout of
        4-bit groups for GPTQ, AWQ and compressed-tensors; None for float weights.

    Raises:
        ValueError: a method that is not known, settings that its layers do not have, or an entry that does not say
            enough without the folder's other files.
    """
    if not settings:
        return None
    if (groups := int4_settings(settings)) is not None:
        return groups
    name = settings.get("quant_method")
    if name in (MixedConfig.quant_method, *method_names()):
        return as_mixed(settings_from_dict(settings))
    for method in METHODS.values():
        if method.reads(settings):
            return as_mixed(method.stored(settings))
    known = ", ".join([MixedConfig.quant_method, *method_names()])
    raise ValueError(
        f"quantisation {name!r} is not one of {known}, int8 of bitsandbytes, compressed-tensors, gptq, awq"
    )

"""Quantisation of a model: what ``--quantize`` means, and what a folder says of its own weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eff_quant import FP4Config, FP8Config, Int8Config, MixedConfig
from eff_quant.fp4.settings import read_compressed_tensors
from eff_quant.fp8_qat.files import fp8_config
from eff_quant.mixed import as_mixed
from eff_quant.registry import METHODS, config_from_dict
from torch import nn

from eff_serve.engine.groups import GroupConfig

FORMATS = ("int8", "int4", "nvfp4", "mxfp4", "fp8")


def settings_for(quantize: Any, threshold: float | None = None) -> Any:
    """Settings to quantise float weights to one of `FORMATS`.

    Raises:
        ValueError: an unknown format, or a threshold with one that has none.
    """
    if quantize not in FORMATS:
        raise ValueError(f"quantize must be one of {', '.join(FORMATS)}, got {quantize!r}")
    if quantize == "int8":
        return Int8Config() if threshold is None else Int8Config(threshold=threshold)
    if threshold is not None:
        raise ValueError(f"threshold={threshold} is for int8, not for {quantize}")
    if quantize == "int4":
        return GroupConfig(bits=4)
    return FP8Config() if quantize == "fp8" else FP4Config(format=quantize)


def stored_settings(entry: dict[str, Any] | None) -> MixedConfig | None:
    """The settings in ``quantization_config`` of a config.json, by layer; None where weights are floats.

    Raises:
        ValueError: a quantisation, or settings of one, that the lean decoder does not run.
    """
    if not entry:
        return None
    method = entry.get("quant_method")
    if method == "bitsandbytes" and entry.get("load_in_8bit"):
        return as_mixed(Int8Config(threshold=float(entry.get("llm_int8_threshold", 6.0)), activation_group=None))
    known = [c.quant_method for c in METHODS]
    if method == MixedConfig.quant_method:
        rules = MixedConfig.from_dict(entry)
    elif method in known:
        rules = as_mixed(config_from_dict(entry))
    elif method == "compressed-tensors":
        rules = as_mixed(_compressed_tensors(entry))
    else:
        raise ValueError(f"quantisation {method!r} is not one of {', '.join(known)}, bitsandbytes' int8")
    for _, config in rules.rules:
        _check(config)
    return rules


def _compressed_tensors(entry: dict[str, Any]) -> Any:
    groups = dict(entry.get("config_groups") or {}).values()
    if not any("fp4" in str(f) for f in (entry.get("format"), *(g.get("format") for g in groups))):
        return fp8_config(entry)
    format, activations = read_compressed_tensors(entry)
    rounding: Any = "even" if format == "mxfp4" else "floor"  # as compressed-tensors rounds activations
    return FP4Config(format=format, activations=activations, scale_rounding=rounding)


def _check(config: Any) -> None:
    """Raise ValueError for settings that the lean decoder does not run."""
    if isinstance(config, Int8Config):
        if config.outlier_weights != "int8":
            raise ValueError(f"int8 with outlier_weights={config.outlier_weights!r} is not 'int8'")
    elif isinstance(config, FP4Config):
        if config.format == "nvfp4" and config.activations == "dynamic":
            raise ValueError("nvfp4 with activations='dynamic' would tie each answer to the others in its batch")
    elif not isinstance(config, FP8Config):
        raise ValueError(f"{config.quant_method} runs only through transformers")


def with_threshold(rules: MixedConfig, threshold: float | None) -> MixedConfig:
    """The rules with another outlier threshold for all int8 layers."""
    if threshold is None:
        return rules
    if not any(isinstance(c, Int8Config) for _, c in rules.rules):
        raise ValueError(f"threshold={threshold} is for int8, which the folder does not hold")

    def change(config: Any) -> Any:
        if not isinstance(config, Int8Config):
            return config
        return replace(config, threshold=threshold, per_token_outliers=False)  # the decoder looks token by token

    return MixedConfig(tuple((patterns, change(config)) for patterns, config in rules.rules))


def describe(rules: MixedConfig) -> str:
    """Names of the formats in a few words."""
    names = [c.format if isinstance(c, FP4Config) else c.quant_method.removeprefix("eff_") for _, c in rules.rules]
    return ", ".join(dict.fromkeys(names))


def settings_of_layer(rules: MixedConfig | None, name: str) -> Any:
    """The settings of one layer, or None."""
    return None if rules is None else rules.config_for([name], nn.Module())

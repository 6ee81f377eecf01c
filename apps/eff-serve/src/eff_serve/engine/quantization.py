"""Quantisation of a model: what ``--quantize`` means, and which stored weights the lean decoder runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eff_quant import FP4Config, FP8Config, Int8Config, MixedConfig
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


def runnable(rules: MixedConfig) -> MixedConfig:
    """The rules by which a folder stores its weights, if the lean decoder runs them all.

    Raises:
        ValueError: settings that it does not run.
    """
    for _, config in rules.rules:
        _check(config)
    return rules


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

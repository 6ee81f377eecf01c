"""bitsandbytes both ways: read its int8 checkpoints, write checkpoints that it reads, convert a loaded model.

The tensors on disk are the same on both sides (``weight``, ``SCB``, ``weight_format``); only the settings differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import Report, replace_module
from torch import nn

from eff_quant.experts import check_no_experts
from eff_quant.hub import check_transformers_model, model_class, quantization_settings, save_as
from eff_quant.linears import find_linears, size_of
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.layer import Int8Linear
from eff_quant.plan import settings_of
from eff_quant.quantize import tell_library


def load_bnb_int8(path: str | Path, config: Int8Config | None = None, **kwargs: Any) -> Any:
    """Load a folder that transformers saved with bitsandbytes int8, to run with `Int8Linear` layers of the same bytes.

    Args:
        path: Folder with config.json and safetensors files, or a model's name.
        config: Settings such as backend or activation; by default bitsandbytes' arithmetic: the file's threshold, one
            scale for each activation row, and all else as in `Int8Config`. The skip list is always the file's.
        **kwargs: Passed on to ``from_pretrained``.

    Returns:
        A transformers model of the class that config.json names. It saves in our own settings; see `save_bnb_int8`.

    Raises:
        ImportError: transformers is not installed. bitsandbytes is not needed.
        OSError: no such model.
        ValueError: the folder is not one of bitsandbytes int8 or holds no safetensors files, or the config asks for
            static outlier columns, whose original weights are not in the file.
        KeyError: an int8 weight has no scales; the message names the module.
    """
    from eff_quant import hf  # imports transformers

    if not isinstance(config, Int8Config | None):
        raise TypeError(f"{path} is int8 of bitsandbytes; its config is an Int8Config, got {type(config).__name__}")
    hf_config, cls = model_class(path)
    settings = quantization_settings(hf_config)
    if not settings.get("load_in_8bit"):
        raise ValueError(f"{path}: quantization_config is {settings or 'absent'}, not one of bitsandbytes int8")
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise ValueError(
            f"{path}: no safetensors files; load it through bitsandbytes, then use convert_from_bnb_(model)"
        )
    _check_no_columns(config)
    config = config or stored_int8(settings)
    hf_config.quantization_config = hf.EffConfig(config).to_dict()
    return cls.from_pretrained(path, config=hf_config, **kwargs)


def stored_int8(settings: Mapping[str, Any]) -> Int8Config:
    """Bitsandbytes' own arithmetic, with the threshold that a ``quantization_config`` of it says."""
    return Int8Config(threshold=float(settings.get("llm_int8_threshold", 6.0)), activation_group=None)


def _check_no_columns(config: Int8Config | None) -> None:
    if config is not None and config.outlier_columns:
        raise ValueError("outlier_weights='original' needs the original weights, which a bitsandbytes model lacks")


def bnb_settings(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` with which transformers loads our int8 model through bitsandbytes.

    Raises:
        ValueError: settings that bitsandbytes does not have (weight-only, groups of activations, per-token outliers,
            static outlier columns), or layers with different settings.
    """
    check_no_experts(model, "bitsandbytes")
    different = settings_of(model)
    if len(different) != 1 or not isinstance(different[0], Int8Config):
        raise ValueError(f"bitsandbytes' int8 needs int8 layers of one setting, the model has {different or 'none'}")
    config = different[0]
    dynamic = config.activation == "dynamic"
    extra = {
        "activation='none'": not dynamic,
        f"activation_group={config.activation_group}": dynamic and config.activation_group is not None,
        "per_token_outliers=True": config.per_token_outliers,
        "outlier_weights='original'": config.outlier_weights == "original",
    }
    if missing := [name for name, used in extra.items() if used]:
        raise ValueError(f"bitsandbytes has no {', '.join(missing)}; use save_pretrained for these settings")
    linears = [f for f in find_linears(model) if not isinstance(f.module, Int8Linear)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": float(config.threshold),
        # transformers reads these as regular expressions
        "llm_int8_skip_modules": [f"{re.escape(name)}$" for f in linears for name in f.names],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def save_bnb_int8(model: Any, path: str | Path, **kwargs: Any) -> None:
    """Save a transformers model with `Int8Linear` layers so that transformers loads it through bitsandbytes.

    Args:
        model: A transformers model.
        path: Folder to write.
        **kwargs: Passed on to ``save_pretrained`` (such as ``max_shard_size``).

    Raises:
        TypeError: not a transformers model.
        ValueError: see `bnb_settings`.
    """
    check_transformers_model(model, "save_bnb_int8")
    save_as(model, path, bnb_settings(model), **kwargs)


def convert_from_bnb_(model: nn.Module, config: Int8Config | None = None) -> Report:
    """Replace bitsandbytes' ``Linear8bitLt`` layers of a loaded model by `Int8Linear` with the same bytes, in place.

    Args:
        model: Any module; a transformers model also learns that the quantiser is now ours.
        config: Settings; by default each layer's own threshold and one scale for each activation row.

    Returns:
        The layers that were replaced, and those with 16-bit weights, which are left.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: the config asks for static outlier columns, whose original weights are gone.
    """
    try:
        from bitsandbytes.nn import Linear8bitLt
    except ImportError as error:
        raise ImportError("convert_from_bnb_ needs bitsandbytes: pip install bitsandbytes") from error
    _check_no_columns(config)
    report = Report("convert_from_bnb_")
    for name, old in list(model.named_modules()):
        if not isinstance(old, Linear8bitLt):
            continue
        if old.weight.dtype != torch.int8:
            report.skip(name, f"weight has dtype {old.weight.dtype}, not int8 yet; use quantize_", size=size_of(old))
            continue
        used = config or Int8Config(threshold=float(old.state.threshold), activation_group=None)
        new = Int8Linear(old.in_features, old.out_features, bias=False, config=used, device="meta")
        scales = old.weight.SCB if getattr(old.weight, "SCB", None) is not None else old.state.SCB
        if scales is None:
            raise KeyError(f"{name}: int8 weight without its scales SCB")
        device = old.weight.device
        new.codes = old.weight.data
        new.SCB = scales.to(device=device, dtype=torch.float32)
        new.weight_format = torch.zeros((), dtype=torch.uint8, device=device)
        new.bias = old.bias
        replace_module(model, name, new.train(old.training))
        report.change(name, bytes_before=size_of(old), bytes_after=size_of(new))
    if report.changed:
        tell_library(model)
        _forget_bnb(model)
    return report


def _forget_bnb(model: Any) -> None:
    """Take away what makes PEFT expect bitsandbytes' layers and transformers use its conversions when saving."""
    if hasattr(model, "is_loaded_in_8bit"):
        model.is_loaded_in_8bit = False
    conversions = getattr(model, "_weight_conversions", None) or []
    theirs = [c for c in conversions if any("Bnb" in type(op).__name__ for op in getattr(c, "operations", ()))]
    if theirs:
        model._weight_conversions = [c for c in conversions if c not in theirs]

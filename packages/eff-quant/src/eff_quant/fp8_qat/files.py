"""Folders of compressed-tensors in FP8, both ways: what llm-compressor writes, and what transformers and vLLM read.

The tensors are those of `FP8Linear` (``weight`` float8_e4m3fn, ``weight_scale``); only the settings differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from eff_quant.experts import check_no_experts
from eff_quant.fp8_qat.config import FP8Config
from eff_quant.fp8_qat.layer import FP8Linear
from eff_quant.hub import check_transformers_model, model_class, quantization_settings, save_as

_FORMATS = ("float-quantized", "naive-quantized")
_WEIGHTS = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "group_size": None,
    "strategy": "channel",
    "dynamic": False,
}
_INPUTS = {**_WEIGHTS, "strategy": "token", "dynamic": True}


def load_compressed_fp8(path: str | Path, **kwargs: Any) -> Any:
    """Load a folder that compressed-tensors wrote in FP8, to run with `FP8Linear` layers of the same bytes.

    Args:
        path: Folder with config.json and safetensors files, or a model's name. Schemes: FP8_DYNAMIC, and weights in FP8
            without rounded activations, with one scale for each row.
        **kwargs: Passed on to ``from_pretrained``.

    Returns:
        A transformers model of the class that config.json names. It saves in our own settings; see
        `save_compressed_fp8`.

    Raises:
        ImportError: transformers is not installed. compressed-tensors is not needed.
        OSError: no such model.
        ValueError: the folder is not one of compressed-tensors, or has another scheme; the message says which part.
    """
    from eff_quant import hf  # imports transformers

    hf_config, cls = model_class(path)
    config = fp8_config(quantization_settings(hf_config), str(path))
    hf_config.quantization_config = hf.EffConfig(config).to_dict()
    return cls.from_pretrained(path, config=hf_config, **kwargs)


def fp8_config(settings: Mapping[str, Any], where: str = "quantization_config") -> FP8Config:
    """Our settings for a ``quantization_config`` of compressed-tensors.

    Raises:
        ValueError: settings that `FP8Linear` does not have.
    """
    if settings.get("quant_method") != "compressed-tensors" or settings.get("format") not in _FORMATS:
        raise ValueError(
            f"{where}: quant_method={settings.get('quant_method')!r}, format={settings.get('format')!r}; wanted "
            f"'compressed-tensors' and one of {', '.join(map(repr, _FORMATS))}"
        )
    groups = list(settings.get("config_groups", {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        raise ValueError(
            f"{where}: config_groups={settings.get('config_groups')!r}; wanted one with targets ['Linear']"
        )
    _check_scheme(f"{where}: weights", groups[0].get("weights"), _WEIGHTS)
    inputs = groups[0].get("input_activations")
    if inputs is not None:
        _check_scheme(f"{where}: input_activations", inputs, _INPUTS)
    if groups[0].get("output_activations") or settings.get("kv_cache_scheme"):
        raise ValueError(f"{where}: output_activations and kv_cache_scheme are not supported, got {dict(settings)}")
    skip = tuple(_pattern(p) for p in settings.get("ignore") or ())
    return FP8Config(activations="none" if inputs is None else "dynamic", skip=skip)


def _pattern(ignored: str) -> str:
    """Our pattern for an entry of ``ignore``: a whole name there, or a regular expression for how names begin."""
    if ignored.startswith("re:"):
        return f"re:(?:{ignored[3:]}).*"
    return ignored if ignored == "lm_head" else f"re:{re.escape(ignored)}"


def _check_scheme(where: str, found: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> None:
    found = found or {}
    different = {k: found.get(k) for k, value in wanted.items() if k != "group_size" and found.get(k) != value}
    if different:
        raise ValueError(f"{where}: {different}; wanted { ({k: wanted[k] for k in different}) }")


def save_compressed_fp8(model: Any, path: str | Path, **kwargs: Any) -> None:
    """Save a transformers model with `FP8Linear` layers so that it loads through compressed-tensors, also in vLLM.

    Args:
        model: A transformers model.
        path: Folder to write.
        **kwargs: Passed on to ``save_pretrained`` (such as ``max_shard_size``).

    Raises:
        TypeError: not a transformers model.
        ValueError: see `compressed_settings`.
    """
    check_transformers_model(model, "save_compressed_fp8")
    save_as(model, path, compressed_settings(model), **kwargs)


def compressed_settings(model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config`` with which compressed-tensors loads our FP8 model.

    Raises:
        ValueError: there are no FP8 layers, E5M2, a layer of GPT-2's ``Conv1D``, or layers with different settings.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FP8Linear)}
    if not layers:
        raise ValueError("the model has no FP8 layers; use quantize_ with an FP8Config first")
    check_no_experts(model, "compressed-tensors")
    activations = {m.config.activations for m in layers.values()}
    if len(activations) > 1:
        raise ValueError(f"the model has layers with activations {sorted(activations)}; a folder holds one setting")
    for name, layer in layers.items():
        if layer.config.dtype != "e4m3":
            raise ValueError(f"{name} has dtype={layer.config.dtype!r}; compressed-tensors supports only 'e4m3'")
        if layer.transposed:
            raise ValueError(f"{name} was a Conv1D, which compressed-tensors does not load; use save_pretrained")
    dynamic = activations == {"dynamic"}
    group = {
        "targets": ["Linear"],
        "weights": _WEIGHTS,
        "input_activations": _INPUTS if dynamic else None,
        "output_activations": None,
        "format": None,
    }
    ignore = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, FP8Linear)]
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": _FORMATS[0] if dynamic else _FORMATS[1],
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }

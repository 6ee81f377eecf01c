"""Loading a quantised model without having to remember how it was saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eff_quant.llm_int8.config import Int8Config
from eff_quant.method import MethodConfig
from eff_quant.mixed import MixedConfig
from eff_quant.registry import METHODS


def load(
    path: str | Path, config: MethodConfig | MixedConfig | Mapping[str, MethodConfig] | None = None, **kwargs: Any
) -> Any:
    """Load a model: quantised by us or another library, or float weights that are quantised on the way.

    Of other libraries it reads int8 of bitsandbytes, FP4 and FP8 of compressed-tensors, and NVFP4 of ModelOpt.

    Args:
        path: Folder with config.json and safetensors files, or a model's name.
        config: Needed for float weights; any that `quantize_` takes. With bitsandbytes int8 it replaces the file's
            settings, see `load_bnb_int8`. A folder that we saved says itself how it is quantised.
        **kwargs: Passed on to ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        A model of the class that config.json names.

    Raises:
        ImportError: transformers is not installed.
        OSError: no such model.
        ValueError: float weights and no config, a config for a folder that has its own, or another quantisation method.
    """
    from eff_quant import hf  # registers the quantiser
    from eff_quant.llm_int8.bnb import load_bnb_int8

    hf_config, cls = model_class(path)
    found = quantization_settings(hf_config)
    if found.get("load_in_8bit"):
        if not isinstance(config, Int8Config | None):
            raise TypeError(f"{path} is int8 of bitsandbytes; its config is an Int8Config, got {type(config).__name__}")
        return load_bnb_int8(path, config, **kwargs)
    method = found.get("quant_method")
    if method is None and config is None:
        raise ValueError(f"{path} holds float weights; give a config to quantise it, such as Int8Config()")
    if method in _READERS and config is None:
        return _READERS[method](found)(path, **kwargs)
    known = [*(c.quant_method for c in METHODS), MixedConfig.quant_method]  # type: ignore[attr-defined]
    if method not in (None, *known, *_READERS):
        raise ValueError(
            f"{path} is quantised by {method!r}; wanted {', '.join((*known, *_READERS))} or bitsandbytes int8"
        )
    if method is not None and config is not None:
        raise ValueError(f"{path} is quantised already with its own settings {found}; leave out config")
    settings = {} if config is None else {"quantization_config": hf.EffConfig(config)}
    return cls.from_pretrained(path, **settings, **kwargs)


def _compressed_tensors(settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The reader of a folder of compressed-tensors: FP4 where that is what it packs, else FP8."""
    from eff_quant.fp4 import load_fp4_checkpoint
    from eff_quant.fp8_qat import load_compressed_fp8

    groups = dict(settings.get("config_groups") or {}).values()
    formats = [settings.get("format"), *(group.get("format") for group in groups)]
    return load_fp4_checkpoint if any("fp4" in str(f) for f in formats) else load_compressed_fp8


def _modelopt(settings: Mapping[str, Any]) -> Callable[..., Any]:
    from eff_quant.fp4 import load_fp4_checkpoint

    return load_fp4_checkpoint


_READERS: dict[Any, Callable[[Mapping[str, Any]], Callable[..., Any]]] = {
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
}


def quantization_settings(hf_config: Any) -> dict[str, Any]:
    """The entry ``quantization_config`` of a model's config.json; empty if there is none."""
    return dict(getattr(hf_config, "quantization_config", None) or {})


def model_class(path: str | Path) -> tuple[Any, Any]:
    """The transformers config of a model folder or name, and the model class that it names.

    Raises:
        OSError: no such model.
        ValueError: config.json names no architecture that transformers has.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model class for architectures={names}"
        )
    return config, cls

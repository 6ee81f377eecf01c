"""Loading a quantised model without having to remember how it was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eff_quant.hub import is_diffusers_folder, model_class, quantization_settings
from eff_quant.method import MethodConfig
from eff_quant.mixed import MixedConfig
from eff_quant.registry import method_names, reader_of


def load(
    path: str | Path, config: MethodConfig | MixedConfig | Mapping[str, MethodConfig] | None = None, **kwargs: Any
) -> Any:
    """Load a model: quantised by us or another library, or float weights that are quantised on the way.

    The model may be one of transformers or of diffusers. What other libraries have quantised it reads, too: int8 of
    bitsandbytes, FP4 and FP8 of compressed-tensors, and NVFP4 of ModelOpt.

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
    if is_diffusers_folder(path):
        from eff_quant import diffusion  # imports diffusers

        return diffusion.load(path, config, **kwargs)
    from eff_quant import hf  # imports transformers

    hf_config, cls = model_class(path)
    found = quantization_settings(hf_config)
    if (read := reader_of(found)) is not None:
        return read(path, config, **kwargs)
    method = found.get("quant_method")
    if method is None and config is None:
        raise ValueError(f"{path} holds float weights; give a config to quantise it, such as Int8Config()")
    known = [*method_names(), MixedConfig.quant_method]
    if method not in (None, *known):
        raise ValueError(
            f"{path} is quantised by {method!r}; wanted {', '.join(known)}, FP4 or FP8 of compressed-tensors, NVFP4 of "
            "modelopt, or bitsandbytes int8"
        )
    if method is not None and config is not None:
        raise ValueError(f"{path} is quantised already with its own settings {found}; leave out config")
    settings = {} if config is None else {"quantization_config": hf.EffConfig(config)}
    return cls.from_pretrained(path, **settings, **kwargs)

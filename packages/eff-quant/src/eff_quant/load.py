"""Loading a saved int8 model without having to remember how it was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eff_quant.llm_int8.config import Int8Config


def load(path: str | Path, config: Int8Config | None = None, **kwargs: Any) -> Any:
    """Load a model folder: int8 as we saved it, int8 of bitsandbytes, or float weights that are quantised on the way.

    Args:
        path: Folder with config.json and safetensors files.
        config: Needed for a folder with float weights. With bitsandbytes int8 it replaces the file's settings, see
            `load_bnb_int8`. A folder that we saved says itself how it is quantised.
        **kwargs: Passed on to ``from_pretrained``, such as ``dtype`` and ``device_map``.

    Returns:
        A model of the class that config.json names.

    Raises:
        ImportError: transformers is not installed.
        ValueError: float weights and no config, a config for a folder that has its own, or another quantisation method.
    """
    from eff_quant import hf  # registers the quantiser
    from eff_quant.llm_int8.bnb import load_bnb_int8

    found = read_quantization_config(path)
    if found.get("load_in_8bit"):
        return load_bnb_int8(path, config, **kwargs)
    method = found.get("quant_method")
    if method is None and config is None:
        raise ValueError(f"{path} holds float weights; give a config to quantise it, such as Int8Config()")
    if method not in (None, Int8Config.quant_method):
        raise ValueError(
            f"{path} is quantised by {method!r}; eff_quant loads {Int8Config.quant_method!r} and bitsandbytes int8"
        )
    if method is not None and config is not None:
        raise ValueError(f"{path} is quantised already with its own settings {found}; leave out config")
    _, cls = model_class(path)
    settings = {} if config is None else {"quantization_config": hf.EffInt8Config(config)}
    return cls.from_pretrained(path, **settings, **kwargs)


def read_quantization_config(path: str | Path) -> dict[str, Any]:
    """The entry ``quantization_config`` of a folder's config.json; empty if there is none.

    Raises:
        FileNotFoundError: no config.json.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is no model folder: it has no config.json")
    return json.loads(file.read_text()).get("quantization_config") or {}


def model_class(path: str | Path) -> tuple[Any, Any]:
    """The transformers config of a folder and the model class that it names.

    Raises:
        ValueError: config.json names no architecture that transformers has.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(
            f"{path}: architectures={names} in config.json, which transformers {transformers.__version__} lacks"
        )
    return config, cls

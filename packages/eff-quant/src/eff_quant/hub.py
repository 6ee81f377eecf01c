"""Model folders: the class of one, what its files hold, by which names transformers knows it, how one is written.

Whatever a method reads or writes in the way of another library goes through here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eff_quant.stacked import STACKS

# Names of dtypes in safetensors files
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip

# Leaves that only quantised layers have.
_MARKS = ("SCB", "weight_packed", "scale", "rotation_in", "rotation_out", "permutation")


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


def is_diffusers_folder(path: str | Path) -> bool:
    """Whether a folder's config.json is of diffusers."""
    file = Path(path) / "config.json"
    return file.is_file() and "_class_name" in json.loads(file.read_text())


def quantization_settings(hf_config: Any) -> dict[str, Any]:
    """The entry ``quantization_config`` of a model's config.json; empty if there is none."""
    return dict(getattr(hf_config, "quantization_config", None) or {})


def packed_formats(settings: Mapping[str, Any]) -> list[str]:
    """The formats that a ``quantization_config`` of compressed-tensors names."""
    groups = dict(settings.get("config_groups") or {}).values()
    return [str(f) for f in (settings.get("format"), *(group.get("format") for group in groups))]


def refuse_config(path: Any, config: Any) -> None:
    """Raise ValueError if a config is given for a folder that says itself how it is quantised."""
    if config is not None:
        raise ValueError(f"{path} is quantised already with its own settings; leave out config, got {config}")


def empty_model(cls: Any, hf_config: Any) -> Any:
    """The float model of a folder, on the meta device."""
    with torch.device("meta"):
        hf_config = copy.deepcopy(hf_config)
        hf_config.quantization_config = None  # there may be none to delete
        del hf_config.quantization_config
        return cls(hf_config)


def headers(files: Iterable[str | Path]) -> dict[str, Tensor]:
    """What safetensors files hold, by key: tensors on the meta device, but single numbers as they are."""
    from safetensors import safe_open

    found = {}
    for file in files:
        with safe_open(file, framework="pt") as f:
            for key in f.keys():  # noqa: SIM118 - a safetensors handle is no dict
                part = f.get_slice(key)
                shape, dtype = part.get_shape(), DTYPES.get(part.get_dtype(), torch.float64)
                single = all(n == 1 for n in shape)
                found[key] = f.get_tensor(key) if single else torch.empty(shape, dtype=dtype, device="meta")
    return found


def quantized_entries(held: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The quantised layers among the entries of a checkpoint, by name, each with its entries."""
    names = set()
    for key, tensor in held.items():
        name, _, leaf = key.rpartition(".")
        if (
            leaf in _MARKS
            or leaf.startswith(("weight_scale", "weight_global_scale"))
            or (leaf == "weight" and is_code(tensor.dtype))
            or _stack_of(leaf) is not None
        ):
            names.add(name)
    layers: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in held.items():
        name, _, leaf = key.rpartition(".")
        if name in layers:
            layers[name][leaf] = tensor
    return layers


def _stack_of(leaf: str) -> str | None:
    """The stack of experts to which a part of it belongs, such as ``gate_up_proj_weight_scale``; its bias is none."""
    for stack in STACKS:
        part = leaf.removeprefix(f"{stack}_")
        if part == leaf:
            continue
        if part in _MARKS or part == "weight" or part.startswith(("weight_scale", "weight_global_scale")):
            return stack
    return None


def is_code(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are codes, which no cast may make or touch."""
    return not dtype.is_floating_point or dtype.itemsize == 1


def with_model_names(model: Any, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Layers of a checkpoint by the names that a transformers model has for them: its renamings, and its prefix."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    renamings: list[Any] = [t for t in transforms if not isinstance(t, WeightConverter)]
    state = model.state_dict()
    found = {}
    for name, value in layers.items():
        leaf = next((s for key in value if (s := _stack_of(key)) is not None), "weight")
        key = rename_source_key(f"{name}.{leaf}", renamings, converters, model.base_model_prefix, state)[0]
        found[key.removesuffix(f".{leaf}")] = value
    return found


def save_as(
    model: Any,
    path: str | Path,
    settings: Mapping[str, Any],
    *,
    state: Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> None:
    """Save a transformers model with the ``quantization_config`` of another library.

    Args:
        model: A transformers model.
        path: Folder to write.
        settings: What config.json is to say.
        state: The state dict to write; by default that of the model.
        **kwargs: Passed on to ``save_pretrained``.

    Raises:
        RuntimeError: transformers wrote other settings.
    """
    quantizer, own = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    model.hf_quantizer = None  # it would put our settings in place
    model.config.quantization_config = settings
    if state is not None:
        kwargs["state_dict"] = dict(state)
    try:
        model.save_pretrained(path, **kwargs)
    finally:
        model.hf_quantizer, model.config.quantization_config = quantizer, own
        if own is None:
            del model.config.quantization_config
    written = json.loads((Path(path) / "config.json").read_text())["quantization_config"]
    if written != json.loads(json.dumps(settings)):
        raise RuntimeError(f"transformers wrote settings that differ from those given: {written}")


def check_transformers_model(model: nn.Module, verb: str) -> None:
    """Raise TypeError for what has no ``save_pretrained``."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise TypeError(f"{verb} takes a transformers model, got {type(model).__name__}")

"""Adapter folders of PEFT: read as experts, written from them. Pickles are never opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import write_whole
from torch import Tensor

from eff_adapters.lora_mixer.expert import LoraExpert

_SETTINGS, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def read_adapter(folder: str | Path) -> LoraExpert:
    """Read ``adapter_config.json`` and ``adapter_model.safetensors``; tensors are on the CPU.

    Raises:
        FileNotFoundError: no such folder, or one of the two files is missing.
        ValueError: the weights are a pickle, a file is cut short, or the adapter is no plain LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; an adapter is a folder that PEFT wrote")
    if not (folder / _WEIGHTS).is_file() and (folder / _PICKLE).is_file():
        raise ValueError(
            f"{folder} holds {_PICKLE}, a pickle, which can run code when it is opened; load it with PEFT where you "
            "trust it and save it again, which writes safetensors"
        )
    for name in (_SETTINGS, _WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}; an adapter folder holds {_SETTINGS} and {_WEIGHTS}")
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / _SETTINGS} is not JSON: {error}") from error
    state = read_tensors(folder / _WEIGHTS)
    try:
        return LoraExpert.from_state_dict(state, settings)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{folder}: {error}") from error


def write_adapter(folder: str | Path, weights: dict[str, tuple[Tensor, Tensor]], settings: dict[str, Any]) -> None:
    """Write factors (a [r, in], b [out, r]) by module as a folder that PEFT reads; a file appears when it is whole."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, pair in weights.items():
        for factor, tensor in zip("AB", pair, strict=True):
            held = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = held
    write_whole(folder / _WEIGHTS, lambda file: save_file(tensors, file, {"format": "pt"}))
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    write_whole(folder / _SETTINGS, lambda file: Path(file).write_text(text, encoding="utf-8"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        ValueError: the file is of another format, or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error

"""A mixture as a folder: experts as PEFT writes them, routers in safetensors, settings in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from eff_kernels.edit import write_whole
from torch import Tensor

from eff_adapters.lora_mixer.peft_files import read_tensors, write_adapter

if TYPE_CHECKING:
    from eff_adapters.lora_mixer.mixer import LoraMixer

CONFIG_FILE, ROUTERS_FILE, EXPERTS_FOLDER = "mixer_config.json", "routers.safetensors", "experts"
_FORMAT, _VERSION = "eff_adapters.lora_mixer", 1


def save_lora_mixer(mixer: LoraMixer, folder: str | Path) -> None:
    """Write ``experts/<name>/``, ``routers.safetensors`` and ``mixer_config.json``, each when it is whole, that last.

    Experts are written in the dtype in which the model holds them, with what the model has of them: see the settings
    ``expert_dtype`` and ``allow_partial``. The base is not written.
    """
    from safetensors.torch import save_file

    folder, state = Path(folder), mixer.state
    folder.mkdir(parents=True, exist_ok=True)
    for name in state.names:
        weights = mixer.expert_weights(name)
        settings = {**state.settings[name], "target_modules": sorted(weights)}
        write_adapter(folder / EXPERTS_FOLDER / name, weights, settings)
    routers = {n: r.weight.detach().cpu().contiguous() for n, r in mixer.routers.items()}
    write_whole(folder / ROUTERS_FILE, lambda file: save_file(routers, file, {"format": "pt"}))
    modes = {layer.mode for layer in mixer.layers.values()}
    content = {
        "format": _FORMAT, "version": _VERSION, "config": state.config.to_dict(), "experts": state.names,
        "modules": list(mixer.layers), "mode": modes.pop() if len(modes) == 1 else "sparse",
    }  # fmt: skip
    text = json.dumps(content, indent=2) + "\n"
    write_whole(folder / CONFIG_FILE, lambda file: Path(file).write_text(text, encoding="utf-8"))


def load_routers(mixer: LoraMixer, file: str | Path) -> None:
    """See `LoraMixer.load_routers`."""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file")
    put_routers(mixer, read_tensors(file), file)


def put_routers(mixer: LoraMixer, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Give the routers what a file holds, all of them or none.

    Raises:
        ValueError: names or shapes differ.
    """
    routers = mixer.routers
    if set(routers) != set(tensors):
        differ = sorted(set(routers) ^ set(tensors))
        raise ValueError(
            f"{file} holds {len(tensors)} routers, the mixture has {len(routers)}; they differ in {differ[:4]}"
        )
    for name, router in routers.items():
        if tensors[name].shape != router.weight.shape or not tensors[name].is_floating_point():
            raise ValueError(
                f"{file}: the router of {name} is {tensors[name].dtype} {list(tensors[name].shape)}, the mixture's has "
                f"shape {list(router.weight.shape)} [experts, in]"
            )
    with torch.no_grad():
        for name, router in routers.items():
            router.weight.copy_(tensors[name])


def read_config(path: Path) -> dict[str, Any]:
    """The settings file of a mixture, checked.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is broken, of something else, or of a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}; it is not a mixture's folder, or is incomplete")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path} is not the configuration of a mixture: format must be {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise ValueError(f"{path} is of version {content.get('version')!r}; this release reads {_VERSION}")
    kinds = {"config": dict, "experts": list, "modules": list, "mode": str}
    wrong = [k for k, kind in kinds.items() if not isinstance(content.get(k), kind)]
    if wrong:
        raise ValueError(f"{path}: {wrong} are missing or of another kind")
    return content

"""The picture side in a folder: modality_config.json and modality.safetensors, without the language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import write_whole
from torch import Tensor

from eff_adapters.llamafusion.config import ModalityTowerConfig
from eff_adapters.llamafusion.tower import ModalityTower, add_modality_tower

CONFIG, WEIGHTS = "modality_config.json", "modality.safetensors"


def parameters(tower: ModalityTower) -> dict[str, torch.nn.Parameter]:
    """What a folder holds: the picture side, and the text side where it is trained."""
    held = dict(tower.picture_parameters())
    if tower.config.trains_text:
        held |= {f"text.{n}": p for n, p in tower.text_parameters().items()}
    return held


def save_pretrained(tower: ModalityTower, folder: str | Path) -> None:
    """Write the picture side, and the text side if that is trained, into a folder."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().cpu().clone().contiguous() for n, p in parameters(tower).items()}
    write_whole(folder / WEIGHTS, lambda path: save_file(weights, path))
    text = json.dumps(tower.config.to_dict(), indent=1) + "\n"
    write_whole(folder / CONFIG, lambda path: Path(path).write_text(text, encoding="utf-8"))


@torch.no_grad()
def load_modality_tower(model: Any, folder: str | Path, *, vae: Any = None) -> ModalityTower:
    """Give a language model the picture side of a folder.

    Raises:
        FileNotFoundError: the folder holds none.
        ValueError: it is that of another model; the model is left as it was.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    config = ModalityTowerConfig.from_dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
    tower = add_modality_tower(model, config, vae=vae)
    wanted = parameters(tower)
    wrong = sorted(wanted.keys() ^ weights.keys()) or sorted(n for n in wanted if wanted[n].shape != weights[n].shape)
    if wrong:
        tower.remove()
        raise ValueError(f"{folder} holds the picture side of another model: {len(wrong)} weights differ, {wrong[:3]}")
    for name, parameter in wanted.items():
        parameter.copy_(weights[name])
    return tower

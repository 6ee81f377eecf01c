"""Folders of LoRA adapters and of mixtures of them, read and compared with the decoder before anything changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_MODULE = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")

Factors = dict[tuple[int, str], tuple[Tensor, Tensor]]
"""By layer and projection, such as (3, "q_proj"): a [rank, in] and b [out, rank] in float32, the scale within b."""


class MixtureFiles(NamedTuple):
    """A folder that `eff_adapters.lora_mixer` wrote.

    Attributes:
        experts: Factors of each expert, in order.
        routers: By layer and projection, [E, in] in float32, the temperature within it.
        top_k: Experts of a token.
    """

    experts: tuple[Factors, ...]
    routers: dict[tuple[int, str], Tensor]
    top_k: int


def is_mixture(folder: Path) -> bool:
    """Whether a folder is one of `eff_adapters.lora_mixer`."""
    from eff_adapters.lora_mixer.files import CONFIG_FILE

    return (folder / CONFIG_FILE).is_file()


def read_lora(name: str, folder: Path, shapes: Mapping[str, tuple[int, int]], num_layers: int) -> Factors:
    """Factors of an adapter that PEFT wrote.

    Raises:
        ValueError: it is no plain LoRA, or is of another model.
        FileNotFoundError: the folder is none of PEFT's.
    """
    from eff_adapters.lora_mixer.peft_files import read_adapter

    found: Factors = {}
    for module, (a, b, scaling) in read_adapter(folder).weights.items():
        place = _place(f"the adapter {name!r}", module, shapes, num_layers)
        out, inputs = shapes[place[1]]
        if (b.size(0), a.size(1)) != (out, inputs):
            raise ValueError(
                f"the adapter {name!r} has {module} from {a.size(1)} to {b.size(0)}, the model from {inputs} to {out}; "
                "it was trained on another one"
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise ValueError(f"the adapter {name!r} has weights of {module} that are not finite")
        found[place] = (a.float(), b.float() * scaling)
    return found


def read_mixture(name: str, folder: Path, shapes: Mapping[str, tuple[int, int]], num_layers: int) -> MixtureFiles:
    """A mixture with its experts and routers.

    Raises:
        ValueError: a file is broken, something is missing or of another model, or the mixture needs to be told domains.
        FileNotFoundError: a file or an expert is missing.
    """
    from eff_adapters.lora_mixer import LoraMixerConfig
    from eff_adapters.lora_mixer.files import CONFIG_FILE, EXPERTS_FOLDER, ROUTERS_FILE, read_config
    from eff_adapters.lora_mixer.peft_files import read_tensors
    from eff_adapters.lora_mixer.plan import check_name, shared_input

    content = read_config(folder / CONFIG_FILE)
    config = LoraMixerConfig.from_dict(content["config"])
    names, modules, mode = content["experts"], content["modules"], content["mode"]
    for expert in names:
        check_name(expert)
    config.check_experts(tuple(names))
    if mode not in ("sparse", "soft"):
        raise ValueError(f"the mixture {name!r} was saved in mode {mode!r}, which is not supported here; use 'sparse'")
    if not (folder / ROUTERS_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {ROUTERS_FILE}")
    tensors = read_tensors(folder / ROUTERS_FILE)
    experts = tuple(read_lora(f"{name}/{e}", folder / EXPERTS_FOLDER / e, shapes, num_layers) for e in names)
    first: dict[str, str] = {}
    routers = {}
    for module in modules:
        place = _place(f"the mixture {name!r}", module, shapes, num_layers)
        held = first.setdefault(shared_input(module) if config.router_scope == "input" else module, module)
        wanted = (len(names), shapes[place[1]][1])
        if held not in tensors or tensors[held].shape != wanted or not torch.isfinite(tensors[held]).all():
            seen = list(tensors[held].shape) if held in tensors else "none"
            raise ValueError(f"the mixture {name!r} needs a finite router {list(wanted)} of {held}, it has {seen}")
        routers[place] = tensors[held].float() / config.temperature
    if unknown := sorted(tensors.keys() - set(first.values())):
        raise ValueError(f"the mixture {name!r} has routers of {unknown[:3]}, which it does not say it routes")
    if unrouted := sorted({p for e in experts for p in e} - routers.keys()):
        raise ValueError(f"experts of the mixture {name!r} change {unrouted[:3]}, which it does not route")
    return MixtureFiles(experts, routers, config.top_k if mode == "sparse" else len(names))


def _place(whose: str, module: str, shapes: Mapping[str, tuple[int, int]], num_layers: int) -> tuple[int, str]:
    found = _MODULE.fullmatch(module)
    if found is None or found[2] not in shapes or int(found[1]) >= num_layers:
        raise ValueError(f"{whose} changes {module}, which this model does not have")
    return int(found[1]), found[2]

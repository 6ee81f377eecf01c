"""What will be routed, decided and checked before anything of a model changes."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from eff_kernels.edit import Report, matches, select
from torch import Tensor, nn

from eff_adapters.lora_mixer.config import LoraMixerConfig
from eff_adapters.lora_mixer.expert import FreshExpert, LoraExpert, LoraWeights
from eff_adapters.lora_mixer.layer import RoutedLoraLinear
from eff_adapters.lora_mixer.peft_files import read_adapter

Expert = LoraExpert | FreshExpert
Source = Any
"""A folder that PEFT wrote, a `LoraExpert`, a `FreshExpert`, or a pair (state dict, settings of PEFT)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# Their fused kernels read the weights of these projections without calling them, so that a wrapper would do nothing.
_STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h", "jamba", "bamba", "zamba", "zamba2")
_FUSED = ("out_proj", "x_proj", "dt_proj", "conv1d")
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Target:
    """A projection that will be routed: its name, itself, its sizes, and dtype and device of its experts."""

    name: str
    module: nn.Module
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: torch.device


def read_experts(experts: Mapping[str, Source]) -> dict[str, Expert]:
    """Bring each source to a `LoraExpert` or `FreshExpert`.

    Raises:
        ValueError: there are none, a name is no folder name, or a source is no plain LoRA.
        TypeError: a source of another kind.
    """
    if not experts:
        raise ValueError("experts is empty; give at least one, such as {'code': 'folder'}")
    found: dict[str, Expert] = {}
    for name, source in experts.items():
        check_name(name)
        try:
            if isinstance(source, LoraExpert | FreshExpert):
                found[name] = source
            elif isinstance(source, str | Path):
                found[name] = read_adapter(source)
            elif isinstance(source, tuple) and len(source) == 2:
                found[name] = LoraExpert.from_state_dict(*source)
            else:
                raise TypeError(
                    f"a {type(source).__name__} cannot be an expert; use a folder, LoraExpert, FreshExpert or the pair "
                    "(state dict, LoraConfig), for alpha is not in the weights"
                )
        except (ValueError, TypeError, FileNotFoundError) as error:
            raise type(error)(f"expert {name!r}: {error}") from error
    return found


def check_name(name: Any) -> None:
    """Refuse a name that could not be a folder."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"expert name {name!r}; use letters, digits, '_', '-' and '.', as it becomes a folder's name")


def find_targets(model: nn.Module, config: LoraMixerConfig, report: Report) -> dict[str, Target]:
    """The projections that ``config.target_modules`` names, in the model's order.

    Raises:
        ValueError: a name fits nothing, or nothing that can be routed.
    """
    found: dict[str, Target] = {}
    inner = [n + "." for n, m in model.named_modules() if isinstance(m, RoutedLoraLinear)]
    if inner:
        raise ValueError(f"the model is routed already ({inner[0][:-1]}); remove that mixture first")
    fitting: dict[str, list[str]] = {p: [] for p in config.target_modules}
    for name, module in select(model, config.target_modules, nn.Module):
        if not name:
            continue
        check_hidden(model, name, module)
        target = _target(name, module)
        if target is None:
            report.skip(name, f"a {type(module).__name__} is no linear projection")
            continue
        for pattern in fitting:
            if matches(name, pattern):
                fitting[pattern].append(name)
        found[name] = target
    for pattern, names in fitting.items():
        if not names:
            raise ValueError(
                f"target_modules: {pattern!r} fits no linear projection of the model{_near(model, pattern)}"
            )
    return found


def check_hidden(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse projections whose wrapper would be passed by, and those that PEFT has wrapped."""
    kind = getattr(getattr(model, "config", None), "model_type", "")
    parts = name.split(".")
    mixer = ("mixer", "mamba", "ssm")
    if kind in _STATE_SPACE and parts[-1] in _FUSED and any(p in mixer for p in parts[:-1]):
        raise ValueError(
            f"{name}: fused kernels of {kind} read the weights of {', '.join(_FUSED)} without calling these layers, so "
            "that experts there would do nothing; route in_proj"
        )
    if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
        state = "merged" if getattr(module, "merged", False) else "active"
        raise ValueError(
            f"{name} has adapters of PEFT ({state}); call unload() on the PEFT model, unmerge_adapter() before it if "
            "they are merged, and pass the adapters as experts"
        )


def fit(model: nn.Module, targets: dict[str, Target], experts: dict[str, Expert], config: LoraMixerConfig) -> Report:
    """Compare adapters with the model; nothing changes.

    Returns:
        What of the adapters is left out (only with ``config.allow_partial``).

    Raises:
        ValueError: an adapter names projections that the model lacks or that are not targets, or shapes differ.
    """
    left_out = Report("lora_mixer")
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    modules = dict(model.named_modules())
    for name, expert in experts.items():
        if isinstance(expert, FreshExpert):
            continue
        unknown = [m for m in expert.weights if m not in modules]
        if unknown:
            raise ValueError(
                f"expert {name!r} has weights for {unknown[0]!r}, which the model lacks{_near(model, unknown[0])}; "
                f"it was trained on {expert.base or 'a base that it does not name'}"
            )
        extra = [m for m in expert.weights if m not in targets]
        if extra and not config.allow_partial:
            leaves = sorted({m.rpartition(".")[2] for m in extra})
            raise ValueError(
                f"expert {name!r} also has weights for {leaves}, which target_modules={list(config.target_modules)} "
                "leaves out; add them, or set allow_partial=True to do without"
            )
        for module in extra:
            left_out.skip(module, f"expert {name!r} has weights here, but it is no target")
        if len(extra) == len(expert.weights):
            raise ValueError(f"expert {name!r} has weights for none of the targets {list(config.target_modules)}")
        for module, weights in expert.weights.items():
            if module in targets:
                _check_shape(name, targets[module], weights)
        if expert.base and base and _last(expert.base) != _last(base):
            warnings.warn(
                f"expert {name!r} was trained on {expert.base!r}, the model is {base!r}; "
                "its updates may mean nothing here",
                stacklevel=4,
            )
    return left_out


def stack(target: Target, experts: dict[str, Expert]) -> dict[str, Any]:
    """Arguments of `RoutedLoraLinear.set_experts` for one projection; ranks are padded to the largest."""
    drawn = [_weights(target, e) for e in experts.values()]
    rank = max(1 if w is None else w.a.shape[0] for w in drawn)
    a = torch.zeros(len(drawn), rank, target.in_features, dtype=target.dtype, device=target.device)
    b = torch.zeros(len(drawn), target.out_features, rank, dtype=target.dtype, device=target.device)
    for i, weights in enumerate(drawn):
        if weights is not None:
            r = weights.a.shape[0]
            a[i, :r], b[i, :, :r] = weights.a, weights.b
    return {
        "a": a, "b": b, "scaling": [1.0 if w is None else w.scaling for w in drawn],
        "ranks": [0 if w is None else w.a.shape[0] for w in drawn], "present": [w is not None for w in drawn],
    }  # fmt: skip


def shared_input(name: str) -> str:
    """A key that projections of one block have in common which read the same input; the name itself if none do."""
    parent, _, leaf = name.rpartition(".")
    return next((f"{parent}.{'+'.join(group)}" for group in _SAME_INPUT if leaf in group), name)


def saved_settings(model: nn.Module, expert: Expert, modules: list[str]) -> dict[str, Any]:
    """PEFT's settings of an expert, with which it is saved, so that its scaling is the same when it is read."""
    if isinstance(expert, LoraExpert):
        return dict(expert.settings)
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return {
        "peft_type": "LORA", "r": expert.rank, "lora_alpha": expert.alpha, "use_rslora": expert.rslora, "bias": "none",
        "target_modules": modules, "base_model_name_or_path": base or None, "inference_mode": True,
    }  # fmt: skip


def _weights(target: Target, expert: Expert) -> LoraWeights | None:
    if isinstance(expert, LoraExpert):
        return expert.weights.get(target.name)
    a: Tensor = torch.empty(expert.rank, target.in_features, device=target.device)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    return LoraWeights(a, torch.zeros(target.out_features, expert.rank, device=target.device), expert.scaling)


def _target(name: str, module: nn.Module) -> Target | None:
    weight = module._parameters.get("weight")
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2:  # transformers', [in, out]
        sizes = (weight.shape[0], weight.shape[1])
    if not all(isinstance(s, int) and s > 0 for s in sizes):
        return None
    held = weight if weight is not None else next((t for t in (*module.parameters(), *module.buffers())), None)
    if weight is None or not weight.is_floating_point():
        dtype = getattr(module, "dtype", None) or module.weight.dtype  # a quantised layer's is that of its outputs
    else:
        dtype = weight.dtype
    device = torch.device("cpu") if held is None else held.device
    return Target(name, module, *sizes, dtype if dtype.is_floating_point else torch.float32, device)  # type: ignore[arg-type]


def _check_shape(name: str, target: Target, weights: LoraWeights) -> None:
    found = (weights.b.shape[0], weights.a.shape[1])
    if found != (target.out_features, target.in_features):
        raise ValueError(
            f"expert {name!r} at {target.name}: its update is {list(found)}, the projection "
            f"{[target.out_features, target.in_features]} [out, in]"
        )


def _near(model: nn.Module, pattern: str) -> str:
    leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if n and not list(m.children())})
    leaves = [leaf for leaf in leaves if not leaf.isdigit()]
    near = difflib.get_close_matches(pattern.rpartition(".")[2].strip("*"), leaves, 4, 0.5)
    return f"; near names: {near}" if near else f"; it has {leaves[:12]}"


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()

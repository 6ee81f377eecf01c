"""Add and remove single experts of a mixture; what can fail is done before anything changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from eff_kernels.edit import replace_module
from torch import Tensor, nn

from eff_adapters.lora_mixer.layer import RoutedLoraLinear
from eff_adapters.lora_mixer.plan import Target, fit, read_experts, saved_settings, stack

if TYPE_CHECKING:
    from eff_adapters.lora_mixer.mixer import LoraMixer


def add_expert(mixer: LoraMixer, name: str, source: Any) -> None:
    """See `LoraMixer.add_expert`."""
    state = mixer.state
    if name in state.names:
        raise ValueError(f"there is an expert {name!r} already; remove it first, or choose another name")
    found, layers = read_experts({name: source}), mixer.layers
    targets = {
        n: Target(n, m, m.in_features, m.out_features, m.lora_A.dtype, m.lora_A.device) for n, m in layers.items()
    }
    left_out = fit(mixer.model, targets, found, state.config)
    given, starts = {}, {}
    for n, layer in layers.items():
        new = stack(targets[n], found)
        given[n] = {
            "a": _joined(layer.lora_A, new["a"], 1),
            "b": _joined(layer.lora_B, new["b"], 2),
            "scaling": [*layer.scaling.tolist(), *new["scaling"]],
            "ranks": [*layer.ranks, *new["ranks"]],
            "present": [*layer.present.tolist(), *new["present"]],
        }
        if layer.kept:
            starts[n] = _joined(layer.start_A, new["a"], 1), _joined(layer.start_B, new["b"], 2)
    weights = {}
    for router in mixer.routers.values():
        row = torch.empty_like(router.weight[:1]).normal_(0, state.config.router_init_std)
        weights[router] = torch.cat([router.weight.detach(), row])
    trained = [*_trained(mixer), *([name] if state.config.expert_mode == "joint" else [])]
    mixer.report.skipped += left_out.skipped
    state.names.append(name)
    state.settings[name] = saved_settings(mixer.model, found[name], list(layers))
    _exchange(mixer, given, weights, starts, trained)


def remove_expert(mixer: LoraMixer, name: str) -> None:
    """See `LoraMixer.remove_expert`."""
    state, layers = mixer.state, mixer.layers
    (index,) = mixer.indices([name])
    left = [i for i in range(len(state.names)) if i != index]
    if not left:
        raise ValueError(f"{name!r} is the only expert; remove() takes the whole mixture away")
    state.config.check_experts(tuple(state.names[i] for i in left))
    last_here = [n for n, layer in layers.items() if not any(layer.ranks[i] for i in left)]
    if len(last_here) == len(layers):
        raise ValueError(f"only the expert {name!r} has weights; remove() takes the whole mixture away")
    given, starts = {}, {}
    for n, layer in layers.items():
        rank = max(layer.ranks[i] for i in left)
        given[n] = {
            "a": layer.lora_A.detach()[left, :rank].clone(), "b": layer.lora_B.detach()[left, :, :rank].clone(),
            "scaling": [float(layer.scaling[i]) for i in left], "ranks": [layer.ranks[i] for i in left],
            "present": [layer.ranks[i] > 0 for i in left],
        }  # fmt: skip
        if layer.kept:
            starts[n] = layer.start_A[left, :rank].clone(), layer.start_B[left, :, :rank].clone()
    weights = {r: r.weight.detach()[left].clone() for r in mixer.routers.values()}
    trained = [n for n in _trained(mixer) if n != name]
    for n in last_here:
        replace_module(mixer.model, n, layers[n].base_layer)
        mixer.report.skip(n, f"only the removed expert {name!r} had weights here")
    state.names.remove(name)
    del state.settings[name]
    _exchange(mixer, given, weights, starts, trained)


def _exchange(
    mixer: LoraMixer,
    given: dict[str, dict[str, Any]],
    weights: dict[Any, Tensor],
    starts: dict[str, tuple[Tensor, Tensor]],
    trained: list[str],
) -> None:
    for router, weight in weights.items():
        router.weight = nn.Parameter(weight, requires_grad=bool(router.weight.requires_grad))
    held = mixer.config.preserve_experts or mixer.experts
    for name, layer in mixer.layers.items():
        layer.set_experts(**given[name])
        if name in starts:
            layer.keep([i for i, n in enumerate(mixer.experts) if n in held], starts[name])
    mixer.set_trainable(experts=trained)


def _trained(mixer: LoraMixer) -> list[str]:
    layer: RoutedLoraLinear = next(iter(mixer.layers.values()))
    return [n for n, on in zip(mixer.experts, layer.trained.tolist(), strict=True) if on and layer.lora_A.requires_grad]


def _joined(held: Tensor, new: Tensor, rank_dim: int) -> Tensor:
    """Experts and one more, both padded to the larger rank."""
    rank = max(held.shape[rank_dim], new.shape[rank_dim])

    def padded(factor: Tensor) -> Tensor:
        short = rank - factor.shape[rank_dim]
        return F.pad(factor.detach(), (0, 0, 0, short) if rank_dim == 1 else (0, short))

    return torch.cat([padded(held), padded(new.to(held.dtype))])

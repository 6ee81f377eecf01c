"""Put experts and routers on a model's projections."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from eff_kernels.edit import Report
from torch import nn

from eff_adapters.lora_mixer.config import LoraMixerConfig
from eff_adapters.lora_mixer.layer import RoutedLoraLinear, Router
from eff_adapters.lora_mixer.mixer import LoraMixer, MixerState
from eff_adapters.lora_mixer.plan import (
    Expert,
    Source,
    Target,
    find_targets,
    fit,
    read_experts,
    saved_settings,
    shared_input,
    stack,
)


def apply_lora_mixer(
    model: nn.Module, config: LoraMixerConfig | None = None, *, experts: Mapping[str, Source]
) -> LoraMixer:
    """Route tokens among LoRA experts in each of a model's chosen projections (LoRA-Mixer, arXiv 2507.00029).

    The base is frozen; by default the experts are too, and only the routers are trained. The mixture starts in mode
    "sparse"; train routers in "soft", experts one domain each in "hard".

    Args:
        model: Any model with linear projections (`nn.Linear`, transformers' ``Conv1D``, quantised layers), such as a
            decoder of transformers.
        config: Which projections, how they are routed, and what routers are taught.
        experts: By name: a folder that PEFT wrote, the pair (state dict, LoraConfig), a `LoraExpert`, or a
            `FreshExpert` that is to be trained. The order numbers them.

    Returns:
        The mixture; its ``remove()`` gives the model back bit for bit.

    Raises:
        ValueError: a target fits nothing, an adapter is no plain LoRA or does not fit the model, ``top_k`` is more than
            the experts; the model is unchanged.
        TypeError, FileNotFoundError: a source that is none, or is not there.
    """
    config = config or LoraMixerConfig()
    found = read_experts(experts)
    config.check_experts(tuple(found))
    report = Report("lora_mixer")
    targets = find_targets(model, config, report)
    report.skipped += fit(model, targets, found, config).skipped
    layers = _layers(targets, found, config, report)
    state = MixerState(
        config=config,
        names=list(found),
        settings={n: saved_settings(model, e, list(layers)) for n, e in found.items()},
        trainable=frozenset(n for n, p in model.named_parameters() if p.requires_grad),
    )
    return LoraMixer.install(model, layers, state, report)


def _layers(
    targets: dict[str, Target], experts: dict[str, Expert], config: LoraMixerConfig, report: Report
) -> dict[str, RoutedLoraLinear]:
    routers: dict[tuple[str, int], Router] = {}
    layers = {}
    for name, target in targets.items():
        given = stack(target, experts)
        if not any(given["present"]):
            report.skip(name, "no expert has weights here")
            continue
        key = shared_input(name) if config.router_scope == "input" else name, target.in_features
        if key not in routers:
            weight = torch.empty(len(experts), target.in_features, dtype=torch.float32, device=target.device)
            routers[key] = Router(weight.normal_(0, config.router_init_std))
        layer = RoutedLoraLinear(
            target.module, given["a"], given["b"], given["scaling"], routers[key], ranks=given["ranks"],
            present=given["present"], top_k=config.top_k, temperature=config.temperature,
            straight_through=config.straight_through,
        )  # fmt: skip
        if config.expert_dtype is not None:
            layer.lora_A.data, layer.lora_B.data = (
                f.data.to(config.expert_dtype) for f in (layer.lora_A, layer.lora_B)
            )
        if config.preserve_coef:
            held = config.preserve_experts or tuple(experts)
            layer.keep([i for i, n in enumerate(experts) if n in held])
        layers[name] = layer.train(target.module.training)
        report.change(name)
    return layers

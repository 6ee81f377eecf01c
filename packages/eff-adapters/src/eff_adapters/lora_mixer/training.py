"""Help for training routers: a start from prompts, and the course of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from eff_kernels.edit import ModuleCall, Run, calibrate

if TYPE_CHECKING:
    from torch import Tensor

    from eff_adapters.lora_mixer.mixer import LoraMixer


@torch.no_grad()
def init_routers_from_prompts(
    mixer: LoraMixer,
    prompts: Mapping[str, Iterable[Any]],
    *,
    center: bool = True,
    gain: float = 1.0,
    run: Run | None = None,
) -> None:
    """Point the router row of each expert at the mean input that its own prompts cause; no training is needed.

    Row e = gain * u / |u| with u the mean input of the projection over the tokens of expert e, in the sparse mixture as
    it stands, minus the mean over the experts where ``center``. (The idea is that of mergekit's hidden gates; not in
    the paper.)

    Args:
        mixer: The mixture.
        prompts: For every expert some batches, as `eff_kernels.edit.calibrate` takes them; padding does not count.
        center: Leave out what the inputs of all experts have in common.
        gain: Length of the rows.
        run: Runs the model on one batch, in place of calling it.

    Raises:
        ValueError: an expert without prompts, prompts of none, or ``gain`` is not positive.
    """
    if set(prompts) != set(mixer.experts):
        raise ValueError(f"prompts are for {sorted(prompts)}, the experts are {sorted(mixer.experts)}; give each some")
    if not 0 < gain < math.inf:
        raise ValueError(f"gain={gain} must be positive and finite")
    routers = mixer.routers
    means = {name: [] for name in routers}  # type: dict[str, list[Tensor]]
    modes = {name: layer.mode for name, layer in mixer.layers.items()}
    mixer.set_mode("sparse")
    try:
        for expert in mixer.experts:
            sums: dict[str, Tensor] = {}
            counts = dict.fromkeys(routers, 0)

            def look(call: ModuleCall, sums: dict[str, Tensor] = sums, counts: dict[str, int] = counts) -> None:
                rows = call.rows(call.input).to(torch.promote_types(call.input.dtype, torch.float32))
                sums[call.name] = sums.get(call.name, 0) + rows.sum(0)
                counts[call.name] += rows.shape[0]

            calibrate(mixer.model, prompts[expert], dict.fromkeys(routers, look), run=run)
            for name in routers:
                if not counts[name]:
                    raise ValueError(f"the prompts of {expert!r} never reach {name}")
                means[name].append(sums[name] / counts[name])
    finally:
        for name, layer in mixer.layers.items():
            layer.set_mode(modes[name])
    for name, router in routers.items():
        rows = torch.stack(means[name])
        if center and len(rows) > 1:
            rows = rows - rows.mean(0)
        router.weight.copy_(gain * rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def cosine_with_warmup(step: int, num_steps: int, *, warmup: float = 0.03, floor: float = 0.1) -> float:
    """Factor of the learning rate at a step, for ``torch.optim.lr_scheduler.LambdaLR``.

    Linear from 0 over the share ``warmup`` of the steps, then a half cosine down to ``floor`` (our choice; the paper
    does not say).

    Raises:
        ValueError: ``num_steps`` is below 1, or a share is not from 0 to 1.
    """
    if num_steps < 1 or not 0 <= warmup <= 1 or not 0 <= floor <= 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1, warmup={warmup} and floor={floor} from 0 to 1")
    rising = max(1, math.ceil(warmup * num_steps)) if warmup else 0
    if step < rising:
        return (step + 1) / rising
    done = min(1.0, (step - rising) / max(1, num_steps - rising))
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

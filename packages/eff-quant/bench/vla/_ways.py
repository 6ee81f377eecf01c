"""The ways to quantise the policy that are compared, the emulation of W4A4, planted outliers, error of the actions."""

from __future__ import annotations

import copy

import torch
from _policy import WIDTH, Policy, observations
from eff_kernels.edit import Report
from eff_quant import (
    QuantLayout,
    W4A8Config,
    apply_scale_table,
    calibrate_scales,
    collect_attention_stats,
    quantize_layout_,
)
from eff_quant.quantvla import ScaleTable
from eff_quant.quantvla.rounding import round_rows
from torch import Tensor, nn

LLM = r"re:language_model\..*_proj"
MLP = r"re:transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"
HEAD = r"re:transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
ATTENTION = (r"re:transformer_blocks\.\d+\.attn[12]",)
SELECTIVE = QuantLayout(include=(LLM, MLP), attention=ATTENTION)
EVERYTHING = QuantLayout(include=(LLM, HEAD), attention=ATTENTION)
WAYS = {"all layers": (EVERYTHING, False), "selective": (SELECTIVE, False), "QuantVLA": (SELECTIVE, True)}

# None emulates W4A4 with planted outliers, of this gain.
SETTINGS = {
    "W4A8": W4A8Config(rotation=None),
    "W4A4 emulated": None,
    "W4A4 emulated, gain 8": None,
    "W4A8 svd": W4A8Config(rotation="svd"),
    "W4A8 hadamard": W4A8Config(rotation="hadamard"),
}
GAINS = {"W4A4 emulated": 20.0, "W4A4 emulated, gain 8": 8.0}


class W4A4Linear(nn.Module):
    """Emulation: weights in 4 bits by row, activations rounded to 4 bits by token, float arithmetic."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = round_rows(linear.weight, 4)
        self.weight = nn.Parameter(codes * scale[:, None])
        self.bias = linear.bias
        self.out_features = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        step = x.abs().amax(-1, keepdim=True).clamp_min(1e-9) / 7
        return nn.functional.linear((x / step).round() * step, self.weight, self.bias)


def plant_outliers(policy: Policy, seed: int, *, channels: int = 4, gain: float = 20.0) -> Policy:
    """Multiply channels of norms and divide them out of the linear layers behind: the same function, hard to round.

    Channels of the language model's norms (in front of its quantised layers and at its output, where cross-attention
    reads) and of those in front of the head's MLPs.
    """
    policy = copy.deepcopy(policy)
    generator = torch.Generator().manual_seed(seed)
    places = [
        (policy.language_model.norm, [p for b in policy.transformer_blocks for p in (b.attn2.to_k, b.attn2.to_v)])
    ]
    for layer in policy.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        places.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        places.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    places += [(block.norm3, [block.ff.net[0].proj]) for block in policy.transformer_blocks]
    with torch.no_grad():
        for norm, behind in places:
            chosen = torch.randperm(WIDTH, generator=generator)[:channels]
            norm.weight[chosen] *= gain
            if getattr(norm, "bias", None) is not None:
                norm.bias[chosen] *= gain
            for linear in behind:
                linear.weight[:, chosen] /= gain
    return policy


def batches(seed: int, count: int = 32) -> list[dict[str, Tensor]]:
    s = observations(count, 1000 + seed)
    return [{**s.observe(torch.Generator().manual_seed(seed))}]


def rollout(policy: nn.Module, batch: dict[str, Tensor]) -> None:
    policy(**batch, noise=torch.randn(len(batch["goal"]), 8, 2))


def quantised(
    teacher: Policy, way: str, seed: int, config: W4A8Config | None
) -> tuple[Policy, ScaleTable | None, Report | None]:
    """A copy quantised one way, its factors and what was replaced; ``config`` None emulates W4A4."""
    layout, match = WAYS[way]
    model = copy.deepcopy(teacher)
    report = None
    if config is None:
        for name in layout.linears(model):
            model.set_submodule(name, W4A4Linear(model.get_submodule(name)))
    else:
        report = quantize_layout_(model, layout, config)
    if not match:
        return model, None, report
    stats = [collect_attention_stats(m, batches(seed), ATTENTION, run=rollout, seed=seed) for m in (teacher, model)]
    table = calibrate_scales(*stats)
    apply_scale_table(model, table)
    return model, table, report


@torch.no_grad()
def action_error(teacher: Policy, model: Policy, seed: int, count: int = 256) -> float:
    """Relative error of the actions at equal noise, on scenes that were not calibrated with."""
    o = observations(count, 5000 + seed).observe(torch.Generator().manual_seed(seed))
    noise = torch.randn(count, 8, 2, generator=torch.Generator().manual_seed(seed))
    wanted = teacher(**o, noise=noise)
    return float((model(**o, noise=noise) - wanted).norm() / wanted.norm())

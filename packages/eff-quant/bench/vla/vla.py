"""QuantVLA on a small policy: error of the actions at equal noise, for each way to quantise it.

    python packages/eff-quant/bench/vla/vla.py [--bits W4A8]

W4A8 runs in integers. W4A4 is emulated (activations rounded to 4 bits in floating point), with outlier channels planted
in front of the quantised layers, to make drift visible. Each setting appends a line to results/vla.jsonl. The policy of
this folder has trained for twenty seconds (training.json) and rarely reaches its goal: its actions can be compared, its
success cannot.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
from pathlib import Path

import torch
from _policy import WIDTH, Policy, load, observations
from eff_kernels.testing.machine import device_name
from eff_quant import (
    QuantLayout,
    ScaleTable,
    W4A8Config,
    apply_scale_table,
    calibrate_scales,
    collect_attention_stats,
    quantize_layout_,
)
from eff_quant.quantvla.rounding import round_rows
from torch import Tensor, nn

RESULTS = Path(__file__).parent.parent / "results" / "vla.jsonl"
LLM = r"re:language_model\..*_proj"
MLP = r"re:transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"
HEAD = r"re:transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
ATTENTION = (r"re:transformer_blocks\.\d+\.attn[12]",)
SELECTIVE = QuantLayout(include=(LLM, MLP), attention=ATTENTION)
EVERYTHING = QuantLayout(include=(LLM, HEAD), attention=ATTENTION)
WAYS = {"all layers": (EVERYTHING, False), "selective": (SELECTIVE, False), "QuantVLA": (SELECTIVE, True)}

SETTINGS = {"W4A4 emulated": None, "W4A8": W4A8Config(), "W4A8 hadamard": W4A8Config(rotation="hadamard")}


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
) -> tuple[Policy, ScaleTable | None, list]:
    """A copy quantised one way; ``config`` None emulates W4A4."""
    layout, match = WAYS[way]
    model = copy.deepcopy(teacher)
    entries = []
    if config is None:
        for name in layout.linears(model):
            model.set_submodule(name, W4A4Linear(model.get_submodule(name)))
    else:
        entries = quantize_layout_(model, layout, config).changed
    if not match:
        return model, None, entries
    stats = [collect_attention_stats(m, batches(seed), ATTENTION, run=rollout, seed=seed) for m in (teacher, model)]
    table = calibrate_scales(*stats)
    apply_scale_table(model, table)
    return model, table, entries


def action_error(teacher: Policy, model: Policy, seed: int) -> float:
    """Relative error of the actions at equal noise, on 256 scenes that were not calibrated with."""
    o = observations(256, 5000 + seed).observe(torch.Generator().manual_seed(seed))
    noise = torch.randn(256, 8, 2, generator=torch.Generator().manual_seed(seed))
    wanted = teacher(**o, noise=noise)
    return float((model(**o, noise=noise) - wanted).norm() / wanted.norm())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bits", choices=SETTINGS, nargs="*", default=list(SETTINGS))
    args = parser.parse_args()
    teacher = load()
    for bits in args.bits:
        config, rows = SETTINGS[bits], []
        for way in WAYS:
            errors, factors, entries = [], [], []
            for seed in range(args.seeds):
                source = plant_outliers(teacher, seed) if config is None else teacher
                model, table, entries = quantised(source, way, seed, config)
                errors.append(round(action_error(source, model, seed), 5))
                if table is not None:
                    factors += [round(f, 4) for m in table.modules.values() for f in (*m.alpha, m.beta)]
            rows.append({"way": way, "errors": errors, "mean": round(sum(errors) / len(errors), 5)})
            if entries:
                sizes = sum(e.bytes_before for e in entries), sum(e.bytes_after for e in entries)
                rows[-1] |= dict(zip(("bytes_float32", "bytes"), sizes, strict=True))
            if factors:
                rows[-1] |= {"factors": [min(factors), max(factors)], "ones": sum(f == 1 for f in factors)}
            print(bits, rows[-1], flush=True)
        line = {
            "bits": bits,
            "rows": rows,
            "torch": torch.__version__,
            "device": device_name("cpu"),
            "threads": torch.get_num_threads(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        with RESULTS.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()

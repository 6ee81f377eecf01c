"""Time and memory of the float policy and of its true integer execution, and of layers of a real size.

    python packages/eff-quant/bench/vla/latency.py

Real size: the MLP of a GR00T-like action head (1536 to 6144 and back, 49 tokens: a state, 32 future tokens, 16 actions)
and a Llama layer of width 2048 (MLP 6144, 16 heads, 8 for keys and values, 128 tokens), with random weights. A line for
each is appended to results/vla_latency.jsonl.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import torch
from _policy import load
from _ways import batches, quantised
from eff_kernels.testing import Provider, measure
from eff_quant import QuantLayout, W4A8Config, quantize_layout_
from torch import nn
from vla import RESULTS, environment

LATENCY = RESULTS.with_name("vla_latency.jsonl")
EVERY_LINEAR = QuantLayout(include=("re:.*",))
CONFIGS = {
    "W4A8": W4A8Config(rotation=None),
    "W4A8 hadamard": W4A8Config(rotation="hadamard"),
    "W4A8 svd": W4A8Config(rotation="svd"),
}


def feed_forward() -> tuple[nn.Module, tuple, dict]:
    from diffusers.models.attention import FeedForward

    return FeedForward(1536, activation_fn="gelu-approximate"), (torch.randn(1, 49, 1536),), {}


def llama_layer() -> tuple[nn.Module, tuple, dict]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=6144,
        num_attention_heads=16,
        num_key_value_heads=8,
        attn_implementation="sdpa",
    )
    x = torch.randn(1, 128, 2048)
    return (
        LlamaDecoderLayer(config, 0),
        (x,),
        {"position_embeddings": LlamaRotaryEmbedding(config)(x, torch.arange(128)[None])},
    )


def size(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def cast(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    return tuple(cast(v, dtype) for v in value)


def compare(spec: str, ways: dict[str, tuple[nn.Module, Callable[[], object]]]) -> None:
    """Time the ways in turn and append their lines."""
    times = measure([Provider(name, lambda i, run=run: run()) for name, (_, run) in ways.items()], rounds=20)
    first = times[next(iter(ways))].p50
    with LATENCY.open("a") as file:
        for name, (module, _) in ways.items():
            t = times[name]
            line = {
                "spec": spec,
                "way": name,
                "p20_us": t.p20 * 1e6,
                "p50_us": t.p50 * 1e6,
                "p80_us": t.p80 * 1e6,
                "n": t.n,
            }
            line = {k: round(v, 1) if isinstance(v, float) else v for k, v in line.items()} | {"bytes": size(module)}
            file.write(json.dumps(line | environment()) + "\n")
            print(
                f"{spec:34} {name:16} {t.p50 * 1e3:9.3f} ms ({first / t.p50:.2f}x) {size(module):12,} bytes", flush=True
            )


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    teacher = load()
    observation, noise = batches(0, 1)[0], torch.randn(1, 8, 2)
    ways = {"float32": teacher} | {name: quantised(teacher, "QuantVLA", 0, c)[0] for name, c in CONFIGS.items()}
    compare(
        "action chunk of the small policy", {n: (m, lambda m=m: m(**observation, noise=noise)) for n, m in ways.items()}
    )
    for spec, make in (("MLP 1536-6144, 49 tokens", feed_forward), ("Llama layer 2048, 128 tokens", llama_layer)):
        module, args, kwargs = make()
        module.eval()
        ways = {"float32": (module, lambda m=module, a=args, k=kwargs: m(*a, **k))}
        half = copy.deepcopy(module).bfloat16()
        a, k = cast(args, torch.bfloat16), {n: cast(v, torch.bfloat16) for n, v in kwargs.items()}
        ways["bfloat16"] = (half, lambda m=half, a=a, k=k: m(*a, **k))
        for name, config in CONFIGS.items():
            model = copy.deepcopy(module)
            quantize_layout_(model, EVERY_LINEAR, config)
            ways[name] = (model, lambda m=model, a=args, k=kwargs: m(*a, **k))
        compare(spec, ways)


if __name__ == "__main__":
    main()

"""What a layer of experts costs on a CPU: ``python packages/eff-quant/bench/experts.py --threads 1``.

One layer with the sizes of OLMoE-1B-7B (64 experts, 8 a token) and random weights and routes, by batch: transformers'
ways of running it in bfloat16, our formats, and int8 codes that are dequantised whole at each call and then run by
transformers' grouped product. Each call gets other tokens, so that other experts have to be read.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import eff_kernels
import eff_quant
import torch
from eff_kernels.testing import Provider, Recorder, same
from eff_quant import FP4Config, FP8Config, Int8Config
from eff_quant.experts import QuantizedExperts
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results" / "experts.jsonl"
KERNELS = Path(eff_kernels.__file__).parent
QUANT = Path(eff_quant.__file__).parent
OPS = ("int8_linear", "fp8_linear", "fp4_linear", "linear")
COMPILED = [file for op in OPS for file in sorted((KERNELS / "native/src").glob(f"{op}*"))]
SOURCES = [*COMPILED, *(KERNELS / "ops" / op for op in OPS), QUANT / "experts"]
HIDDEN, INNER, EXPERTS, PLACES = 2048, 1024, 64, 8
SETS = 16  # of tokens
FORMATS = {
    "eff int8": Int8Config(),
    "eff int8 weights": Int8Config(activation="none"),
    "eff fp8": FP8Config(),
    "eff mxfp4": FP4Config(format="mxfp4"),
    "eff nvfp4": FP4Config(),
}


def layer() -> nn.Module:
    """Experts of transformers in bfloat16."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    config = OlmoeConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_experts=EXPERTS)
    module = OlmoeExperts(config).bfloat16().eval()
    for p in module.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return module


def in_the_way(module: nn.Module, way: str) -> nn.Module:
    """The same weights, run in another way of transformers."""
    other = copy.copy(module)
    other.config = copy.copy(module.config)
    other.config._experts_implementation = way
    return other


@torch.no_grad()
def truth(module: nn.Module, call: tuple[Tensor, ...]) -> Tensor:
    """What experts give in float32, by transformers' plain loop."""
    floats = module.to_experts() if isinstance(module, QuantizedExperts) else copy.deepcopy(module).float()
    x, ids, weights = call
    return in_the_way(floats, "eager")(x.float(), ids, weights.float())


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a layer of experts in each format.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 32))
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    source = layer()
    modules = {f"transformers {way}": in_the_way(source, way) for way in ("grouped_mm", "batched_mm", "eager")}
    modules |= {name: QuantizedExperts.from_experts(source, config) for name, config in FORMATS.items()}
    size = sum(p.numel() * p.element_size() for p in source.parameters())
    for name in FORMATS:
        print(f"{name}: {sum(t.nbytes for t in modules[name].buffers()) / size:.3f} of bfloat16's bytes")
    whole = modules["eff int8 weights"]
    recorder = Recorder("experts", None if options.dry else RESULTS, sources=SOURCES)
    for m in options.rows:
        calls = [tokens(m) for _ in range(SETS)]

        def run(call: Callable[..., Tensor], calls: list[tuple[Tensor, ...]] = calls) -> Callable[[int], Tensor]:
            def one(i: int) -> Tensor:
                with torch.no_grad():
                    return call(*calls[i % SETS])

            return one

        def dequantised(*call: Tensor) -> Tensor:
            return in_the_way(whole.to_experts(torch.bfloat16), "grouped_mm")(*call)

        providers, truths = [], {}
        for name, module in {**modules, "dequantise all": dequantised}.items():
            if name == "transformers batched_mm" and m > 1:
                continue  # it copies a matrix for each choice
            held = source if name.startswith("transformers") else modules.get(name, whole)
            if held not in truths:
                truths[held] = truth(held, calls[0])
            # bfloat16 holds eight bits; int8 also rounds the activations
            call = run(module)
            providers.append(Provider(name, call, check=lambda r=call, w=truths[held]: same(r(0), w, tolerance=0.02)))
        recorder.run(f"OLMoE, {m} tokens", providers, mode="forward", rounds=options.rounds)
    print(recorder.table("transformers grouped_mm"))


def tokens(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, their experts and weights."""
    ids = torch.rand(m, EXPERTS).topk(PLACES).indices
    return torch.randn(m, HIDDEN).bfloat16(), ids, torch.rand(m, PLACES).bfloat16() / PLACES


main()

"""Benchmark of fp8_linear: ``python packages/eff-kernels/bench/ops/fp8_linear.py --threads 1``.

A bfloat16 layer of a model against its FP8 form (E4M3, one scale a row). "cache": the same weights in each call;
"memory": enough weights take turns that none is still cached. The peers decode to bfloat16 and multiply that;
torch._scaled_mm, which rounds both sides, is left out where one call takes longer than ``--patience`` milliseconds.
"""

import argparse
import copy
import time
from pathlib import Path

import eff_kernels
import torch
from eff_kernels import fp8_linear, fp8_quantize, linear
from eff_kernels.ops.fp8_linear.specs import SHAPES
from eff_kernels.testing import Provider, Recorder, same
from eff_kernels.testing.machine import last_level_cache_bytes
from optimum.quanto import freeze, qfloat8, quantize
from torchao.quantization import Float8WeightOnlyConfig, quantize_

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/fp8_linear", "ops/linear/cpu.py", "op.py", "native/call.py", "native/src")
ROWS = (1, 16, 64, 512)
FROM_MEMORY = 64  # rows up to which the weights' way from memory shows
SECONDS = 8.0  # for the samples of one shape


class Layers:
    """The same weights in every library's form, as many copies as a mode needs."""

    def __init__(self, n: int, k: int, count: int, peers: bool) -> None:
        base = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        self.bf16 = [copy.deepcopy(base) for _ in range(count)]
        one = fp8_quantize(base.weight.float())
        self.codes = [(one.codes.clone(), one.scale.clone()) for _ in range(count)]
        self.torchao = [torch.nn.Sequential(copy.deepcopy(base)) for _ in range(count if peers else 1)]
        self.quanto = [torch.nn.Sequential(copy.deepcopy(base)) for _ in range(count if peers else 1)]
        for layer in self.torchao:
            quantize_(layer, Float8WeightOnlyConfig())
        for layer in self.quanto:
            quantize(layer, weights=qfloat8)
            freeze(layer)

    def peer(self, name: str, i: int) -> torch.nn.Module:
        layers = getattr(self, name)
        return layers[i % len(layers)]


def scaled_mm(layers: Layers, x: torch.Tensor, i: int) -> torch.Tensor:
    codes, scale = layers.codes[i % len(layers.codes)]
    rows = fp8_quantize(x)
    return torch._scaled_mm(rows.codes, codes.t(), rows.scale[:, None], scale[None], out_dtype=torch.bfloat16)


def providers(layers: Layers, x: torch.Tensor, options: argparse.Namespace) -> list[Provider]:
    count = len(layers.bf16)
    codes, scale = layers.codes[0]
    truth = {a: fp8_linear(x.double(), codes, scale, activations=a, backend="reference") for a in ("none", "dynamic")}
    truth["bf16"] = x.double() @ layers.bf16[0].weight.double().t()
    functions = {
        "bf16 nn.Linear": (lambda i: layers.bf16[i % count](x), "bf16"),
        "eff linear, bf16": (lambda i: linear(x, layers.bf16[i % count].weight), "bf16"),
        "torchao": (lambda i: layers.peer("torchao", i)(x), "none"),
        "quanto": (lambda i: layers.peer("quanto", i)(x), "none"),
        "torch._scaled_mm": (lambda i: scaled_mm(layers, x, i), "dynamic"),
        "eff": (lambda i: fp8_linear(x, *layers.codes[i % count]), "none"),
        "eff, dynamic": (lambda i: fp8_linear(x, *layers.codes[i % count], activations="dynamic"), "dynamic"),
    }
    found = []
    for name, (run, kind) in functions.items():
        result = run(0)
        start = time.perf_counter()
        run(0)
        took = 1e3 * (time.perf_counter() - start)
        if took > options.patience and not name.startswith(("eff", "bf16")):
            print(f"{name}: {took:.0f} ms for a call, left out")
            continue
        good = same(result, truth[kind], tolerance=3e-2)
        found.append(Provider(name, run, backend="cpu" if name.startswith("eff") else "", check=lambda good=good: good))
    return found


def rounds_for(candidates: list[Provider]) -> int:
    start = time.perf_counter()
    for provider in candidates:
        provider.run(0)
    return max(3, min(30, int(SECONDS / (8 * (time.perf_counter() - start)))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times fp8_linear against bfloat16, torchao, quanto and _scaled_mm.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default="", help="only shapes NxK that contain this text")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--patience", type=float, default=250, help="milliseconds that a peer's call may take")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = None if options.dry else RESULTS / "fp8_linear.jsonl"
    recorder = Recorder("fp8_linear", path, sources=[PACKAGE / s for s in SOURCES])
    for n, k in SHAPES:
        if options.shapes not in f"{n}x{k}":
            continue
        many = max(2, int(2 * last_level_cache_bytes() / (n * k)) + 1)
        for mode, count in (("cache", 1), ("memory", many)):
            layers = Layers(n, k, count, peers=True)
            for m in options.rows:
                if mode == "memory" and m > FROM_MEMORY:
                    continue
                x = torch.randn(m, k).bfloat16()
                nbytes = 2 * m * k + n * k + 4 * n + 2 * m * n
                with torch.inference_mode():
                    found = providers(layers, x, options)
                    recorder.run(
                        f"{n}x{k} M={m}", found, mode=mode, bytes=nbytes, working_set=nbytes * count,
                        rounds=rounds_for(found),
                    )  # fmt: skip
                print(recorder.table().splitlines()[-1], flush=True)
    print(f"\n{recorder.table()}")


main()

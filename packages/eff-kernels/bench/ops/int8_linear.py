"""Benchmark of int8_linear: ``python packages/eff-kernels/bench/ops/int8_linear.py --threads 1``.

A bfloat16 layer of a model against its int8 form, activations quantised within the call. 0.5 % of the columns of x hold
outliers. "cache": the same weights in each call; "memory": enough weights take turns that none is still cached.
"""

import argparse
import copy
import time
from pathlib import Path

import bitsandbytes
import eff_kernels
import torch
from eff_kernels import int8_linear, int8_quantize_rows
from eff_kernels.ops.int8_linear import reference
from eff_kernels.ops.int8_linear.specs import SHAPES
from eff_kernels.testing import Provider, Recorder, same
from eff_kernels.testing.machine import last_level_cache_bytes
from torch import Tensor
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/int8_linear", "ops/linear/cpu.py", "op.py", "native/call.py", "native/src")
ROWS = (1, 16, 64, 512)
FROM_MEMORY = 64  # rows up to which the weights' way from memory shows
SECONDS = 20.0  # for the samples of one shape


class Layers:
    """The same weights in every library's form, as many copies as a mode needs."""

    def __init__(self, n: int, k: int, count: int) -> None:
        base = [torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16).requires_grad_(False) for _ in range(3)]
        self.bf16 = [copy.deepcopy(base[i % 3]) for i in range(count)]
        self.codes = [int8_quantize_rows(layer.weight.float())[:2] for layer in self.bf16]
        self.bnb = {t: [self._bitsandbytes(layer, t) for layer in self.bf16] for t in (0.0, 6.0)}
        self.torchao = [torch.nn.Sequential(copy.deepcopy(layer)) for layer in self.bf16]
        for layer in self.torchao:
            quantize_(layer, Int8DynamicActivationInt8WeightConfig())

    @staticmethod
    def _bitsandbytes(layer: torch.nn.Linear, threshold: float) -> torch.nn.Module:
        n, k = layer.weight.shape
        quantized = bitsandbytes.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
        quantized.load_state_dict(layer.state_dict())
        return quantized.to("cpu")


def activations(m: int, k: int) -> Tensor:
    x = torch.randn(m, k).clamp(-5, 5)
    outliers = torch.randperm(k)[: max(1, k // 200)]
    x[:, outliers] = 6.5 + torch.rand(m, len(outliers))
    return x.bfloat16()


def providers(layers: Layers, x: Tensor, compiled: bool) -> list[Provider]:
    count = len(layers.bf16)
    codes, absmax = layers.codes[0]
    fixed = (False, "dynamic", None, torch.float32)
    truth = {t: reference.int8_linear(x, codes, absmax, None, t, *fixed) for t in (0.0, 6.0)}
    grouped = {"threshold": 6.0, "activation_group": 128}

    exact = x.double() @ layers.bf16[0].weight.double().t()

    def make(name: str, run, wanted: Tensor, backend: str = "") -> Provider:
        good = same(run(0), wanted, tolerance=2e-2)
        return Provider(name, run, backend=backend, check=lambda: good)

    found = [make("bf16 nn.Linear", lambda i: layers.bf16[i % count](x), exact)]
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(torch.nn.functional.linear, dynamic=False)
        found.append(make("torch.compile", lambda i: function(x, layers.bf16[i % count].weight), exact))
    found += [
        make("torchao", lambda i: layers.torchao[i % count](x), truth[0.0]),
        make("bitsandbytes", lambda i: layers.bnb[0.0][i % count](x), truth[0.0]),
        make("bitsandbytes, 6", lambda i: layers.bnb[6.0][i % count](x), truth[6.0]),
        make("eff", lambda i: int8_linear(x, *layers.codes[i % count]), truth[0.0], "cpu"),
        make("eff, 6", lambda i: int8_linear(x, *layers.codes[i % count], threshold=6.0), truth[6.0], "cpu"),
        make("eff, 6, 128", lambda i: int8_linear(x, *layers.codes[i % count], **grouped), truth[6.0], "cpu"),
    ]
    return found


def rounds_for(candidates: list[Provider]) -> int:
    start = time.perf_counter()
    for provider in candidates:
        provider.run(0)
    return max(3, min(40, int(SECONDS / (2 * (time.perf_counter() - start)))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times int8_linear against bfloat16, torch.compile, bitsandbytes.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", default="", help="only shapes NxK that contain this text")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = None if options.dry else RESULTS / "int8_linear.jsonl"
    recorder = Recorder("int8_linear", path, sources=[PACKAGE / s for s in SOURCES])
    for n, k in SHAPES:
        if options.shapes not in f"{n}x{k}":
            continue
        many = max(2, int(4 * last_level_cache_bytes() / (n * k)) + 1)
        for mode, count in (("cache", 1), ("memory", many)):
            layers = Layers(n, k, count)
            for m in options.rows:
                if mode == "memory" and m > FROM_MEMORY:
                    continue
                x = activations(m, k)
                nbytes = 2 * m * k + n * k + 4 * n + 2 * m * n
                with torch.inference_mode():
                    found = providers(layers, x, not options.no_compile)
                    recorder.run(
                        f"{n}x{k} M={m}", found, mode=mode, bytes=nbytes, working_set=nbytes * count,
                        rounds=rounds_for(found),
                    )  # fmt: skip
                print(recorder.table().splitlines()[-1], flush=True)
    print(f"\n{recorder.table()}")


main()

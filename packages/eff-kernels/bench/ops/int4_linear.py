"""Benchmark of int4_linear: ``python packages/eff-kernels/bench/ops/int4_linear.py --threads 1 2``.

All providers get bfloat16 activations. "eff" quantises them row by row, "eff static" by a scale for each column, "eff
int8 static" does so with int8 weights; "int4pack" is PyTorch's own product with packed int4 weights in groups of 32.
"cache": the same weights in each call; "memory": enough weights take turns that none is still cached.
"""

import argparse
import time
import warnings
from pathlib import Path

import bitsandbytes
import eff_kernels
import torch
from eff_kernels import int4_linear, int4_pack, int8_linear, int8_quantize_rows, int8_static_linear, linear
from eff_kernels.ops.int4_linear.specs import SHAPES
from eff_kernels.testing import Provider, Recorder, same
from eff_kernels.testing.machine import last_level_cache_bytes
from torch import Tensor
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = (
    *("ops/int4_linear/cpu.py", "ops/int4_linear/api.py", "ops/int8_linear/cpu.py", "op.py", "native/call.py"),
    *(
        f"native/src/{name}"
        for name in ("int4_linear.c", "dot4.h", "int8_linear.c", "int8_tile.h", "int8_tile_512.h", "eff.h")
    ),
)
ROWS = (1, 16, 64, 512)
FROM_MEMORY = 64  # rows up to which the weights' way from memory shows
SECONDS = 8.0  # for the samples of one shape


class Layers:
    """The same weights in every library's form; as many copies as it takes to miss the cache."""

    def __init__(self, n: int, k: int, cached: bool) -> None:
        base = [torch.randn(n, k).bfloat16() for _ in range(2)]
        reach = 2 * last_level_cache_bytes()

        def copies(values: list, nbytes: float) -> list:
            count = 2 if cached else max(2, int(reach / nbytes) + 1)
            return [tuple(t.clone() if isinstance(t, Tensor) else t for t in values[i % 2]) for i in range(count)]

        size = n * k
        self.step = torch.full((k,), 4 / 127)
        self.weight = base[0].float()
        self.bf16 = copies([(w,) for w in base], 2 * size)
        self.int8 = copies([int8_quantize_rows(w)[:2] for w in base], size)
        self.static8 = copies([(w, a / 127 * self.step[0]) for w, a in self.int8[:2]], size)
        self.int4 = copies([int4_codes(w) for w in base], size / 2)
        self.static4 = copies([(w, s * self.step[0]) for w, s in self.int4[:2]], size / 2)
        self.nf4 = copies([bitsandbytes.functional.quantize_4bit(w, quant_type="nf4") for w in base], size * 9 / 16)
        self.int4pack = copies([groups_of_32(w) for w in base], size * 5 / 8)
        # It dequantises its weight at each call, which takes up to seconds: one small shape shows it.
        self.torchao = [] if size > 2**20 or not cached else [(torchao_layer(w),) for w in base]


def int4_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(1) / 7
    return int4_pack((weight.float() / scale[:, None]).round().to(torch.int8)), scale


def groups_of_32(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    blocks = weight.float().view(n, k // 32, 32)
    scale = (blocks.abs().amax(-1) / 7).clamp(min=1e-8)
    codes = ((blocks / scale[..., None]).round().clamp(-8, 7) + 8).int().view(n, k)
    pairs = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous().bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), pairs


def torchao_layer(weight: Tensor) -> torch.nn.Module:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(layer)
    quantize_(model, Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4))
    return model


def providers(layers: Layers, x: Tensor) -> list[Provider]:
    truth = x.float() @ layers.weight.t()

    def make(name: str, items: list, call, *, tolerance: float, backend: str = "") -> Provider:
        good = same(call(*items[0]), truth, tolerance=tolerance)
        return Provider(name, lambda i: call(*items[i % len(items)]), backend=backend, check=lambda: good)

    def nf4(codes, state):
        return bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

    def int4pack(codes, pairs):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, 32, pairs)

    def static4(codes, scale):
        return int4_linear(x, codes, scale, input_scale=layers.step)

    def static8(codes, scale):
        return int8_static_linear(x, codes, scale, layers.step)

    found = [
        make("bf16 nn.Linear", layers.bf16, lambda w: torch.nn.functional.linear(x, w), tolerance=2e-2),
        make("eff linear", layers.bf16, lambda w: linear(x, w), tolerance=2e-2, backend="cpu"),
        make("bitsandbytes nf4", layers.nf4, nf4, tolerance=0.15),
        make("int4pack", layers.int4pack, int4pack, tolerance=0.15),
    ]
    if layers.torchao and len(x) <= FROM_MEMORY:
        found.append(make("torchao", layers.torchao, lambda layer: layer(x), tolerance=0.15))
    return [
        *found,
        make("eff int8", layers.int8, lambda *w: int8_linear(x, *w), tolerance=3e-2, backend="cpu"),
        make("eff int8 static", layers.static8, static8, tolerance=3e-2, backend="cpu"),
        make("eff static", layers.static4, static4, tolerance=0.25, backend="cpu"),
        make("eff", layers.int4, lambda *w: int4_linear(x, *w), tolerance=0.25, backend="cpu"),
    ]


def rounds_for(candidates: list[Provider]) -> int:
    start = time.perf_counter()
    for provider in candidates:
        provider.run(0)
    return max(3, min(40, int(SECONDS / (2 * (time.perf_counter() - start)))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times int4_linear against bfloat16, int8 and other 4-bit products.")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--shapes", default="", help="only shapes NxK that contain this text")
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    path = None if options.dry else RESULTS / "int4_linear.jsonl"
    recorder = Recorder("int4_linear", path, sources=[PACKAGE / s for s in SOURCES])
    for n, k in SHAPES:
        if options.shapes not in f"{n}x{k}":
            continue
        for mode in ("cache", "memory"):
            layers = Layers(n, k, mode == "cache")
            for m in options.rows:
                if mode == "memory" and m > FROM_MEMORY:
                    continue
                x = torch.randn(m, k).clamp(-4, 4).bfloat16()
                nbytes = 2 * m * k + n * k // 2 + 4 * n + 2 * m * n
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    with torch.inference_mode():
                        found = providers(layers, x)
                        recorder.run(
                            f"{n}x{k} M={m}", found, mode=mode, bytes=nbytes,
                            working_set=nbytes * (1 if mode == "cache" else len(layers.int4)), rounds=rounds_for(found),
                        )  # fmt: skip
                    print(recorder.table().splitlines()[-1], flush=True)
    print(f"\n{recorder.table()}")


main()

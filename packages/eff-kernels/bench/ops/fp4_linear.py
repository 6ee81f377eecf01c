"""Benchmark of fp4_linear: ``python packages/eff-kernels/bench/ops/fp4_linear.py --threads 1 2``.

All providers get bfloat16 activations. "eff linear" is this library's product with the weight in bfloat16, "int4" is
PyTorch's own product with packed int4 weights in groups of 32. "cache": the same weights in each call; "memory": enough
weights take turns that none is still cached.
"""

import argparse
import time
import warnings
from pathlib import Path

import bitsandbytes
import eff_kernels
import torch
from eff_kernels import FP4Codes, fp4_linear, fp4_quantize, linear
from eff_kernels.ops.fp4_linear.specs import SHAPES
from eff_kernels.testing import Provider, Recorder, same
from eff_kernels.testing.machine import last_level_cache_bytes
from torch import Tensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = (
    *("ops/fp4_linear/cpu.py", "ops/fp4_linear/api.py", "native/call.py"),
    *(f"native/src/{name}" for name in ("fp4_linear.c", "fp4_linear.h", "fp4.h", "lanes.h", "eff.h", "parallel.c")),
)
FROM_MEMORY = 16  # rows up to which the weights' way from memory shows


class Layers:
    """The same weights in every library's form; as many copies as it takes to miss the cache."""

    def __init__(self, n: int, k: int, cached: bool) -> None:
        base = [torch.randn(n, k).bfloat16() for _ in range(2)]
        reach = 2 * last_level_cache_bytes()

        def copies(values: list, nbytes: float) -> list:
            count = 2 if cached else max(2, int(reach / nbytes) + 1)
            return [clone(values[i % 2]) for i in range(count)]

        size = n * k
        self.weight = base[0].float()
        self.bf16 = copies(base, 2 * size)
        self.codes = {f: copies([fp4_quantize(w, f) for w in base], size * 9 / 16) for f in ("nvfp4", "mxfp4")}
        self.nf4 = copies([bitsandbytes.functional.quantize_4bit(w, quant_type="nf4") for w in base], size * 9 / 16)
        self.int4 = copies([int4_pack(w) for w in base], size * 5 / 8)
        # It unpacks its weight at each call, which takes up to seconds: one small shape shows it.
        self.torchao = [NVFP4Tensor.to_nvfp4(w, is_swizzled_scales=False) for w in base] if size < 2**20 else []


def clone(value):
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, FP4Codes):
        return FP4Codes(*(t if t is None else t.clone() for t in value))
    if isinstance(value, tuple):  # bitsandbytes' state is small and stays shared
        return tuple(v.clone() if isinstance(v, Tensor) else v for v in value)
    raise TypeError(type(value))


def int4_pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    blocks = weight.float().view(n, k // 32, 32)
    scale = (blocks.abs().amax(-1) / 7).clamp(min=1e-8)
    codes = ((blocks / scale[..., None]).round().clamp(-8, 7) + 8).int().view(n, k)
    pairs = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous().bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), pairs


def providers(layers: Layers, x: Tensor) -> list[Provider]:
    truth = x.float() @ layers.weight.t()

    def make(name: str, items: list, call, *, tolerance: float, backend: str = "") -> Provider:
        good = same(call(items[0]), truth, tolerance=tolerance)
        return Provider(name, lambda i: call(items[i % len(items)]), backend=backend, check=lambda: good)

    def nf4(item):
        return bitsandbytes.matmul_4bit(x, item[0].t(), quant_state=item[1])

    def int4(item):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, item[0], 32, item[1])

    def ours(item, **options):
        return fp4_linear(x, *item, **options)

    found = [
        make("bf16 nn.Linear", layers.bf16, lambda w: torch.nn.functional.linear(x, w), tolerance=2e-2),
        make("eff linear", layers.bf16, lambda w: linear(x, w), tolerance=2e-2, backend="cpu"),
        make("bitsandbytes nf4", layers.nf4, nf4, tolerance=0.15),
        make("int4", layers.int4, int4, tolerance=0.15),
    ]
    if layers.torchao:
        call = lambda w: torch.nn.functional.linear(x, w)  # noqa: E731
        found.append(make("torchao nvfp4", layers.torchao, call, tolerance=0.15))
    for format in ("nvfp4", "mxfp4"):
        call = lambda item, format=format: ours(item, format=format)  # noqa: E731
        found.append(make(f"eff {format}", layers.codes[format], call, tolerance=0.15, backend="cpu"))
    call = lambda item: ours(item, format="nvfp4", activations="dynamic")  # noqa: E731
    found.append(make("eff nvfp4 W4A4", layers.codes["nvfp4"], call, tolerance=0.2, backend="cpu"))
    return found


def rounds_for(candidates: list[Provider], seconds: float) -> int:
    start = time.perf_counter()
    for provider in candidates:
        provider.run(0)
    return max(7, min(60, int(seconds / (2 * (time.perf_counter() - start)))))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times fp4_linear against bfloat16, bitsandbytes, int4 and torchao.")
    parser.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--shapes", default="", help="only shapes NxK that contain this text")
    parser.add_argument("--rows", type=int, nargs="*", default=(1, 4, 16, 64, 512))
    parser.add_argument("--seconds", type=float, default=4.0, help="for the samples of one shape")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    path = None if options.dry else RESULTS / "fp4_linear.jsonl"
    recorder = Recorder("fp4_linear", path, sources=[PACKAGE / s for s in SOURCES])
    for n, k in SHAPES:
        if options.shapes not in f"{n}x{k}":
            continue
        for mode in ("memory", "cache"):
            layers = Layers(n, k, mode == "cache")
            for m in options.rows:
                if (m > FROM_MEMORY) != (mode == "cache") or m * n * k > 2**34:
                    continue
                x = torch.randn(m, k).bfloat16()
                nbytes = 2 * m * k + n * k * 9 // 16 + 2 * m * n
                working_set = nbytes * (2 if mode == "cache" else len(layers.codes["nvfp4"]))
                for threads in options.threads:
                    torch.set_num_threads(threads)
                    with torch.inference_mode():
                        found = providers(layers, x)
                        rounds = rounds_for(found, options.seconds)
                        label = f"{n}x{k} M={m}"
                        recorder.run(label, found, mode=mode, bytes=nbytes, working_set=working_set, rounds=rounds)
                    print(recorder.table().splitlines()[-1], flush=True)
    print(f"\n{recorder.table()}")


main()

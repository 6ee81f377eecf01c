"""Benchmark of linear: ``python packages/eff-kernels/bench/ops/linear.py --threads 1``.

float32 activations times a bfloat16 weight. The peers compute in one dtype: float32 with a weight twice as large, or
bfloat16 with rounded activations. "memory": enough weights take turns that none is still in a cache.
"""

import argparse
from pathlib import Path

import eff_kernels
import torch
import torch.nn.functional as F
from eff_kernels import linear
from eff_kernels.testing import Provider, Recorder, same
from eff_kernels.testing.machine import last_level_cache_bytes

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/linear", "op.py", "native/call.py", "native/src/linear.c", "native/src/eff.h")
SHAPES = ((576, 1536), (2048, 2048), (49152, 576))


def main() -> None:
    parser = argparse.ArgumentParser(description="Times linear against float32, bfloat16 and torch.compile.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = None if options.dry else RESULTS / "linear.jsonl"
    recorder = Recorder("linear", path, sources=[PACKAGE / s for s in SOURCES])
    for n, k in SHAPES:
        many = max(2, int(4 * last_level_cache_bytes() / (2 * n * k)) + 1)
        for mode, count in (("cache", 1), ("memory", many)):
            narrow = [torch.randn(n, k).bfloat16() for _ in range(count)]
            wide = [w.float() for w in narrow]
            for m in (1, 16) if mode == "memory" or n > 10000 else (1, 16, 64, 512):
                x = torch.randn(m, k)
                short = x.bfloat16()
                functions = {
                    "float32": lambda i, x=x: F.linear(x, wide[i % count]),  # noqa: B023
                    "bfloat16": lambda i, x=short: F.linear(x, narrow[i % count]),  # noqa: B023
                    "eff": lambda i, x=x: linear(x, narrow[i % count]),  # noqa: B023
                }
                if not options.no_compile:
                    torch._dynamo.reset()
                    compiled = torch.compile(F.linear, dynamic=False)
                    functions["torch.compile"] = lambda i, x=x, f=compiled: f(x, wide[i % count])  # noqa: B023
                with torch.inference_mode():
                    truth = x.double() @ narrow[0].double().t()
                    found = [
                        Provider(name, f, check=lambda f=f, t=truth: same(f(0), t, tolerance=2e-2))
                        for name, f in functions.items()
                    ]
                    nbytes = 2 * n * k + 4 * m * (n + k)
                    recorder.run(
                        f"{n}x{k} M={m}", found, mode=mode, bytes=nbytes, working_set=nbytes * count,
                        rounds=options.rounds,
                    )  # fmt: skip
    print(recorder.table())


main()

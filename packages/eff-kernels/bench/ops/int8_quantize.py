"""Benchmark of int8_quantize_rows: ``python packages/eff-kernels/bench/ops/int8_quantize.py --threads 1``."""

import argparse
from pathlib import Path

import bitsandbytes.functional
import eff_kernels
import torch
from eff_kernels import int8_quantize_columns, int8_quantize_rows
from eff_kernels.testing import Provider, Recorder

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/int8_quantize", "op.py", "native/call.py", "native/src")
SHAPES = ((1, 576), (64, 576), (512, 2048), (512, 11008))


def eager(x, threshold=0.0):
    absmax = x.abs().amax(-1).float()
    return (x * (127 / absmax)[:, None]).round().to(torch.int8), absmax


def eager_columns(x):
    absmax = x.abs().amax(0).float()
    return (x * (127 / absmax)).round().to(torch.int8), absmax


def near(a, b) -> bool:
    return bool(((a[0].int() - b[0].int()).abs() <= 1).all()) and torch.allclose(a[1], b[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Times int8 quantisation against eager, torch.compile, bitsandbytes.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in ("int8_quantize_rows", "int8_quantize_columns"):
        path = None if options.dry else RESULTS / f"{name}.jsonl"
        recorder = Recorder(name, path, sources=[PACKAGE / s for s in SOURCES])
        for m, k in SHAPES:
            x = torch.randn(m, k)
            rows = name == "int8_quantize_rows"
            plain = eager if rows else eager_columns
            ours = int8_quantize_rows if rows else int8_quantize_columns
            functions = {"eager": lambda x=x, f=plain: f(x)}
            if not options.no_compile:
                torch._dynamo.reset()
                compiled = torch.compile(plain, dynamic=False)
                functions["torch.compile"] = lambda x=x, f=compiled: f(x)
            if rows:
                functions["bitsandbytes"] = lambda x=x: bitsandbytes.functional.int8_vectorwise_quant(x)
            functions["eff"] = lambda x=x, f=ours: f(x)
            functions["eff, 6"] = lambda x=x, f=ours: f(x, threshold=6.0)
            with torch.inference_mode():
                truth = plain(x)
                found = [
                    Provider(n, lambda i, f=f: f(), check=lambda f=f, t=truth: near(f()[:2], t))
                    for n, f in functions.items()
                ]
                nbytes = x.nbytes + x.numel()
                recorder.run(f"{m}x{k} fp32", found, mode="cache", bytes=nbytes, rounds=options.rounds)
        print(f"\n{name}\n{recorder.table()}")


main()

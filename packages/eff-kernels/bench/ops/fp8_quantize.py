"""Benchmark of fp8_quantize and fp8_round: ``python packages/eff-kernels/bench/ops/fp8_quantize.py --threads 1``."""

import argparse
from pathlib import Path

import eff_kernels
import torch
from eff_kernels import fp8_quantize, fp8_round
from eff_kernels.testing import Provider, Recorder
from torchao.quantization.granularity import PerRow
from torchao.quantization.qat import Float8FakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import Float8FakeQuantizer

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = ("ops/fp8_quantize", "op.py", "native/call.py", "native/src")
SHAPES = ((1, 576), (64, 576), (512, 2048), (512, 11008))


def eager(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def eager_round(x):
    codes, scale = eager(x)
    return codes.float() * scale


def main() -> None:
    parser = argparse.ArgumentParser(description="Times rounding to FP8 against eager, torch.compile and torchao.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    torchao = Float8FakeQuantizer(Float8FakeQuantizeConfig(dtype=torch.float8_e4m3fn, granularity=PerRow()))
    for name in ("fp8_quantize", "fp8_round"):
        path = None if options.dry else RESULTS / f"{name}.jsonl"
        recorder = Recorder(name, path, sources=[PACKAGE / s for s in SOURCES])
        plain, ours = (eager, fp8_quantize) if name == "fp8_quantize" else (eager_round, fp8_round)
        for m, k in SHAPES:
            x = torch.randn(m, k)
            functions = {"eager": lambda x=x, f=plain: f(x)}
            if not options.no_compile:
                torch._dynamo.reset()
                compiled = torch.compile(plain, dynamic=False)
                functions["torch.compile"] = lambda x=x, f=compiled: f(x)
            if name == "fp8_round":
                functions["torchao"] = lambda x=x: torchao(x)
            functions["eff"] = lambda x=x, f=ours: f(x)
            with torch.inference_mode():
                truth = eager_round(x)
                found = [
                    Provider(n, lambda i, f=f: f(), check=lambda f=f, t=truth: equal(f(), t))
                    for n, f in functions.items()
                ]
                nbytes = x.nbytes + (x.numel() if name == "fp8_quantize" else x.nbytes)
                recorder.run(f"{m}x{k} fp32", found, mode="cache", bytes=nbytes, rounds=options.rounds)
        print(f"\n{name}\n{recorder.table()}")


def equal(found, truth) -> bool:
    if not isinstance(found, torch.Tensor):
        codes, scale = found
        found = codes.float() * scale.reshape(-1, 1)
    return torch.equal(found, truth)


main()

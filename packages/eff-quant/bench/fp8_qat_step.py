"""What FP8 noise costs in training: ``python packages/eff-quant/bench/fp8_qat_step.py --threads 1``.

One step (forward, backward) of a frozen stack of MLPs whose last projection learns, in float32 and bfloat16: without
noise, with ours, with ours when no rounded weight is kept, and with torchao's.
"""

import argparse
import copy
from pathlib import Path

import eff_kernels
import eff_quant
import torch
from eff_kernels.testing import Provider, Recorder, same
from eff_quant import FP8QATConfig, freeze_except_, prepare_qat_
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerRow
from torchao.quantization.qat import Float8FakeQuantizeConfig, QATConfig

RESULTS = Path(__file__).parent / "results" / "fp8_qat_step.jsonl"
KERNELS = Path(eff_kernels.__file__).parent
SOURCES = [KERNELS / "ops/fp8_quantize", KERNELS / "native/src", Path(eff_quant.__file__).parent / "fp8_qat"]
WIDTH, DEPTH = 512, 3


def stack(dtype: torch.dtype) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(DEPTH)]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, WIDTH)).to(dtype)
    freeze_except_(model, [str(DEPTH)])
    return model


def variants(dtype: torch.dtype) -> dict[str, nn.Module]:
    base = stack(dtype)
    models = {name: copy.deepcopy(base) for name in ("plain", "eff", "eff, nothing kept", "torchao")}
    prepare_qat_(models["eff"])
    prepare_qat_(models["eff, nothing kept"], FP8QATConfig(cache_frozen_weights=False))
    noise = Float8FakeQuantizeConfig(dtype=torch.float8_e4m3fn, granularity=PerRow())
    quantize_(models["torchao"], QATConfig(activation_config=noise, weight_config=noise, step="prepare"))
    freeze_except_(models["torchao"], [str(DEPTH)])
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description="Times a training step with and without FP8 noise.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, nargs="*", default=(64, 512))
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    recorder = Recorder("fp8_qat_step", None if options.dry else RESULTS, sources=SOURCES)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        models = variants(dtype)
        for m in options.rows:
            x = torch.randn(m, WIDTH, dtype=dtype)
            truth = models["eff"](x).detach()

            def step(i: int, model: nn.Module, x: torch.Tensor = x) -> None:
                model.zero_grad()
                model(x).square().mean().backward()

            def good(model: nn.Module, x: torch.Tensor = x, truth: torch.Tensor = truth) -> bool:
                return same(model(x).detach(), truth, tolerance=0.1)

            found = [
                Provider(n, lambda i, f=f, step=step: step(i, f), check=lambda f=f, good=good: good(f))
                for n, f in models.items()
            ]
            recorder.run(f"M={m} {name}", found, mode="step", rounds=options.rounds)
    print(recorder.table())


main()

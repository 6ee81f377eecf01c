"""Benchmark of fp4_quantize: ``python packages/eff-kernels/bench/ops/fp4_quantize.py --threads 1``."""

import argparse
from pathlib import Path

import eff_kernels
import torch
from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
from eff_kernels import FP4Codes, fp4_dequantize, fp4_quantize
from eff_kernels.ops.fp4_quantize import reference
from eff_kernels.testing import Provider, Recorder, same
from torch import Tensor
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

RESULTS = Path(__file__).parents[1] / "results"
PACKAGE = Path(eff_kernels.__file__).parent
SOURCES = (
    *("ops/fp4_quantize/api.py", "ops/fp4_quantize/cpu.py", "op.py", "native/call.py"),
    *("native/src/fp4_quantize.c", "native/src/fp4.h", "native/src/eff.h"),
)
SHAPES = ((1, 576), (64, 2048), (2048, 2048))


def torchao(x: Tensor, format: str):
    if format == "mxfp4":
        scale, packed = to_mx(x, torch.float4_e2m1fn_x2, 32)
        return packed, scale
    scale, packed = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))
    return packed, scale


def compressed_tensors(x: Tensor, codes: FP4Codes) -> Tensor:
    """Codes alone: the scales are given."""
    return quantize_and_pack_fp4(x, codes.scale.float(), global_scale=1 / codes.global_scale, group_size=16)


def equal(result, codes: FP4Codes) -> bool:
    return torch.equal(result[0], codes.packed) and torch.equal(
        result[1].view(torch.uint8), codes.scale.view(torch.uint8)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Times fp4_quantize against torchao and compressed-tensors.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="do not write the records")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    path = None if options.dry else RESULTS / "fp4_quantize.jsonl"
    recorder = Recorder("fp4_quantize", path, sources=[PACKAGE / s for s in SOURCES])
    for rows, k in SHAPES:
        x = torch.randn(rows, k)
        for format in ("nvfp4", "mxfp4"):
            wanted = fp4_quantize(x, format, backend="reference")
            functions = {
                "eager": lambda x=x, f=format: fp4_quantize(x, f, backend="reference"),
                "torchao": lambda x=x, f=format: torchao(x, f),
                "eff": lambda x=x, f=format: fp4_quantize(x, f),
            }
            with torch.inference_mode():
                found = [
                    Provider(name, lambda i, f=f: f(), check=lambda f=f, w=wanted: equal(f(), w))
                    for name, f in functions.items()
                ]
                if format == "nvfp4":
                    found.insert(2, Provider(
                        "compressed-tensors", lambda i, x=x, w=wanted: compressed_tensors(x, w),
                        check=lambda x=x, w=wanted: torch.equal(compressed_tensors(x, w), w.packed),
                    ))  # fmt: skip
                recorder.run(
                    f"{rows}x{k} {format}", found, mode="cache", bytes=x.nbytes + x.numel() * 9 // 16,
                    rounds=options.rounds,
                )  # fmt: skip
                arguments = (wanted.packed, wanted.scale.view(torch.uint8), wanted.global_scale, format, torch.float32)
                ways = {
                    "eager": lambda a=arguments: reference.dequantize(*a),
                    "eff": lambda w=wanted, f=format: fp4_dequantize(w, f),
                }
                back = [
                    Provider(name, lambda i, f=f: f(), check=lambda f=f, x=x: same(f(), x, tolerance=0.15))
                    for name, f in ways.items()
                ]
                recorder.run(
                    f"back, {rows}x{k} {format}", back, mode="cache", bytes=x.nbytes + x.numel() * 9 // 16,
                    rounds=options.rounds,
                )  # fmt: skip
    print(f"\n{recorder.table()}")


main()

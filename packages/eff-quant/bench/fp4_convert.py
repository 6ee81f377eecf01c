"""Speed of turning weights into FP4: ``python packages/eff-quant/bench/fp4_convert.py --threads 1``.

One bfloat16 weight of a model's MLP, from plain tensor to packed codes and scales, by `FP4Linear.quantized_tensors`,
torchao and compressed-tensors. The bytes are those of the weight that is read, so that ``achieved`` is GB/s of it.
"""

import argparse
import warnings
from pathlib import Path

import eff_kernels
import eff_quant
import torch
from eff_kernels.testing import Provider, Recorder
from eff_quant import FP4Config, FP4Linear
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

RESULTS = Path(__file__).parent / "results"
SOURCES = ("fp4",)
KERNELS = ("ops/fp4_quantize", "op.py")
SHAPES = {"Qwen2.5-0.5B up": (4864, 896), "Llama-3.1-8B up": (14336, 4096)}
CONFIGS = {"nvfp4": FP4Config(), "mxfp4": FP4Config(format="mxfp4", scale_rounding="even")}


def torchao(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Packed codes and scales by torchao."""
    if format == "mxfp4":
        scale, packed = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)
    else:
        scale, packed = nvfp4_quantize(x, 16, per_tensor_amax_to_scale(x.abs().max()))
    return packed, scale


def compressed_tensors(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Packed codes and scales by compressed-tensors."""
    scheme = preset_name_to_scheme(format.upper(), ["Linear"])
    state = {"weight": x}
    if format == "nvfp4":
        state["weight_global_scale"] = generate_gparam(x.min(), x.max())
    blocks = x.unflatten(-1, (-1, scheme.weights.group_size))
    state["weight_scale"], _ = calculate_qparams(
        blocks.amin(-1), blocks.amax(-1), scheme.weights, state.get("weight_global_scale")
    )
    done = BaseCompressor.get_value_from_registry(f"{format}-pack-quantized").compress(state, scheme)
    return done["weight_packed"], done["weight_scale"]


def ours(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Packed codes and scales by eff."""
    tensors = FP4Linear.quantized_tensors(x, CONFIGS[format])
    return tensors["weight_packed"], tensors["weight_scale"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the conversion of weights to FP4.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sources = [Path(eff_quant.__file__).parent / s for s in SOURCES]
    sources += [Path(eff_kernels.__file__).parent / s for s in KERNELS]
    recorder = Recorder("fp4_convert", RESULTS / "fp4_convert.jsonl", sources=sources)
    for name, shape in SHAPES.items():
        if args.shape not in (name, "all"):
            continue
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        for format in CONFIGS:
            wanted = torchao(x, format)[0]

            def provider(label: str, run, wanted=wanted, format=format, x=x) -> Provider:
                # The tensor scales differ in their last bit, those of compressed-tensors by bfloat16: some ties differ.
                share = 0.9 if label == "compressed-tensors" else 0.99
                close = (run(x, format)[0] == wanted).float().mean() > share
                return Provider(label, lambda i: run(x, format), check=lambda: bool(close))

            providers = [provider(n, f) for n, f in (("torchao", torchao), ("compressed-tensors", compressed_tensors))]
            providers.append(provider("eff", ours))
            recorder.run(f"{name} {shape[0]}x{shape[1]} {format}", providers, mode="convert", bytes=x.nbytes, rounds=5)
    print(recorder.table())


if __name__ == "__main__":
    main()

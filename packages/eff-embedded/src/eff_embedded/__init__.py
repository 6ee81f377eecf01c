"""Real models and data without a download: small models from packages, generated pictures, and trained checkpoints."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

_LOADERS = {
    "load_collage_diffusion": "eff_embedded.diffusion",
    "load_smollm2": "eff_embedded.language",
    "load_smollm2_eyes": "eff_embedded.eyes",
    "load_vit": "eff_embedded.vision",
}
"""Where the loaders lie; each comes with its libraries when it is first asked for."""

__all__ = ["__version__", "load_collage_diffusion", "load_smollm2", "load_smollm2_eyes", "load_vit"]

__version__ = version("eff-embedded")


def __getattr__(name: str) -> Any:
    if name not in _LOADERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LOADERS[name]), name)

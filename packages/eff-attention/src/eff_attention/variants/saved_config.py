"""The config of a model with mixers, such that a saved folder is not taken for a standard model.

Its class is the host's with a ``model_type`` that transformers does not know: AutoModel refuses the folder, where it
would else load the projections into standard attention without a word.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

PREFIX = "attention_variants_"


def mark(config: Any) -> None:
    """Let a config say that its model has mixers."""
    if not config.model_type.startswith(PREFIX):
        base: Any = type(config)
        config.__class__ = _class_of(base)


def read(path: str | Path) -> Any:
    """The config in a folder, of the host's own class."""
    from transformers import AutoConfig

    values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(values.pop("model_type").removeprefix(PREFIX), **values)


@functools.cache
def _class_of(base: Any) -> Any:
    body = {
        "model_type": PREFIX + base.model_type,
        "__module__": __name__,
        "__qualname__": f"Hybrid{base.__name__}",
        "__doc__": f"{base.__name__} of a model with mixers in the place of attention.",
    }
    return type(base)(body["__qualname__"], (base,), body)


def __getattr__(name: str) -> Any:
    """Where pickles look for the classes."""
    if not name.startswith("Hybrid"):
        raise AttributeError(name)
    import transformers

    return _class_of(getattr(transformers, name.removeprefix("Hybrid")))

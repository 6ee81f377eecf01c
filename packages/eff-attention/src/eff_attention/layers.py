"""Kinds of the layers of a decoder of transformers."""

from __future__ import annotations

from typing import Any


def attention_types(config: Any) -> list[str]:
    """Which attention each layer has by the model's config: "full_attention", "sliding_attention" or another."""
    windowed = getattr(config, "sliding_window", None) is not None
    every = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return list(getattr(config, "layer_types", None) or every)

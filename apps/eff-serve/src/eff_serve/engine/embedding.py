"""Vectors of texts: the mean, or the last, of the hidden states that a model ends with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eff_serve.engine.decoder import Decoder
from eff_serve.engine.threads import on_a_thread_that_ends

Pooling = Literal["mean", "last"]


def embed(decoder: Decoder, tokens: Sequence[int], pooling: Pooling = "mean") -> Tensor:
    """The vector [hidden] of one text, float32 of length one.

    The text is read as a sequence of its own, beside what the engine does, on a thread that ends: a thread that stayed
    would keep a second pool of OpenMP threads, which slows the engine down.

    Args:
        decoder: The model.
        tokens: Token ids of the text, at least one.
        pooling: "mean" over all tokens, or the "last" one.

    Raises:
        ValueError: there is no token, or there are more than the model reads.
    """
    if not 1 <= len(tokens) <= decoder.config.max_model_len:
        raise ValueError(f"a text must have 1 to {decoder.config.max_model_len} tokens, got {len(tokens)}")
    found: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        found.append(torch.nn.functional.normalize(pooled.float(), dim=0))

    on_a_thread_that_ends(lambda: decoder.look(torch.tensor(list(tokens)), on_last=keep))
    return found[0]


def embedding_size(engine: Any) -> int | None:
    """Numbers of a vector; None for an engine whose model runs through transformers."""
    decoder = getattr(engine, "decoder", None)
    return decoder.config.hidden_size if isinstance(decoder, Decoder) else None


def embed_with(engine: Any, tokens: Sequence[int], pooling: Pooling) -> np.ndarray[Any, np.dtype[np.float32]]:
    """`embed` by an engine that has an `embedding_size`."""
    vector: np.ndarray[Any, np.dtype[np.float32]] = embed(engine.decoder, tokens, pooling).numpy()
    return vector

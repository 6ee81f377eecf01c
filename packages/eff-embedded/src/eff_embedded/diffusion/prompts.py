"""Prompts to what the transformer reads: hidden states of SmolLM2's twelfth layer, each entry scaled alike."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LAYERS = 12
LENGTH = 32
WIDTH = 576
_LARGEST = 8.0  # deviations; the first token of a text has entries a hundred times larger than all others
_log = logging.getLogger(__name__)


class Prompts(NamedTuple):
    """Encoded prompts.

    Attributes:
        tokens: One state a token, zeros behind the end, [prompts, `LENGTH`, `WIDTH`].
        pooled: Mean over the tokens, [prompts, `WIDTH`].
    """

    tokens: Tensor
    pooled: Tensor


def load_text_encoder(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The first `LAYERS` layers of SmolLM2-135M-Instruct (transformers' LlamaModel) and the tokenizer."""
    from transformers import AutoTokenizer, LlamaModel
    from transformers.utils import logging as hub_logging

    from eff_embedded.language import smollm2_folder

    folder = smollm2_folder(dtype=torch.bfloat16)
    level = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it would list all weights of the layers that are left out
    try:
        model = LlamaModel.from_pretrained(folder, num_hidden_layers=LAYERS, dtype=dtype)
    finally:
        hub_logging.set_verbosity(level)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def hidden_states(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """States of each text's tokens, [tokens, `WIDTH`], not yet scaled; an empty text has none.

    Each length is computed apart, so that a text's states do not depend on what it is encoded with. Texts of more than
    `LENGTH` tokens lose their end, with a warning.
    """
    ids = [tokenizer(text).input_ids for text in texts]
    for text, found in zip(texts, ids, strict=True):
        if len(found) > LENGTH:
            _log.warning("prompt of %d tokens cut to %d: %s", len(found), LENGTH, text)
    ids = [found[:LENGTH] for found in ids]
    states: list[Tensor] = [torch.zeros(0, WIDTH)] * len(ids)
    for length in sorted({len(found) for found in ids} - {0}):
        places = [i for i, found in enumerate(ids) if len(found) == length]
        inputs = torch.tensor([ids[i] for i in places], device=model.device)
        for i, state in zip(places, model(input_ids=inputs, use_cache=False).last_hidden_state, strict=True):
            states[i] = state
    return states


def pack(states: Sequence[Tensor], mean: Tensor, std: Tensor) -> Prompts:
    """Scale the states of several prompts and lay them side by side.

    The empty prompt is all zeros, which is what guidance compares with.
    """
    tokens = torch.zeros(len(states), LENGTH, WIDTH, device=mean.device)
    pooled = torch.zeros(len(states), WIDTH, device=mean.device)
    for i, state in enumerate(states):
        if len(state):
            tokens[i, : len(state)] = ((state.to(mean) - mean) / std).clamp(-_LARGEST, _LARGEST)
            pooled[i] = tokens[i, : len(state)].mean(0)
    return Prompts(tokens, pooled)

"""The dimensions in which the hidden states of sinks are huge: published ones, and how to find them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eff_attention.passes import decoder_layers, text_config

# From the paper's appendix, by kind of language model, hidden size and largest vocabulary: Llama-2 and what was tuned
# from it (Vicuna), Qwen2 and InternLM2.5.
_KNOWN = (
    ("llama", 4096, 33_000, (1415, 2533)),
    ("llama", 5120, 33_000, (2100, 4743)),
    ("qwen2_vl_text", 3584, 160_000, (458, 2570)),
    ("internlm2", 4096, 100_000, (3584,)),
)


def known_sink_dims(model: Any) -> tuple[int, ...] | None:
    """Published dimensions of the language model of ``model``, or None."""
    config = text_config(model)
    for kind, size, vocabulary, dims in _KNOWN:
        if config.model_type == kind and config.hidden_size == size and config.vocab_size <= vocabulary:
            return dims
    return None


@torch.no_grad()
def find_sink_dims(
    model: Any,
    inputs: Tensor | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    tau: float | None = None,
    layers: Sequence[int] | None = None,
    max_dims: int = 8,
    *,
    share: float = 0.8,
) -> list[int]:
    """Dimensions that are huge at the first token of nearly every prompt in nearly every middle layer.

    Args:
        model: A decoder of transformers, with or without pictures.
        inputs: Prompts: ids [K, T], or arguments of the model, one or several; text is enough. None takes eight
            prompts of random tokens behind the model's first token, as what is looked for hardly depends on the text.
        tau: A dimension is huge above tau times the root mean square; None takes sqrt(0.098 D).
        layers: Whose inputs are looked at; None takes a quarter to three quarters of the depth.
        max_dims: Most dimensions.
        share: Of the pairs of prompt and layer in which a dimension must be huge.

    Returns:
        The dimensions, the largest on average first; empty if there is none.

    Raises:
        ValueError: a layer does not exist, or tau can never fire.
        NotImplementedError: the layers of the model cannot be reached.
    """
    blocks = [layer for _, layer in decoder_layers(model)]
    depth, size = len(blocks), text_config(model).hidden_size
    chosen = list(range(depth // 4, 3 * depth // 4 + 1) if layers is None else layers)
    if not chosen or not 0 <= min(chosen) <= max(chosen) < depth:
        raise ValueError(f"layers={chosen}; the model has 0..{depth - 1}")
    limit = math.sqrt(0.098 * size) if tau is None else tau
    if not 0 < limit < math.sqrt(size):
        raise ValueError(f"tau={limit}; use more than 0 and less than sqrt({size}), which no value is above")
    given = _prompts(model) if inputs is None else inputs
    if isinstance(given, Tensor):
        given = {"input_ids": given}
    batches = [given] if isinstance(given, Mapping) else given
    hidden = torch.cat([_first_tokens(model, batch, [blocks[i] for i in chosen]) for batch in batches])
    return dims_of_sinks(hidden, limit, max_dims, share=share)


def dims_of_sinks(hidden: Tensor, tau: float, max_dims: int = 8, *, share: float = 0.8) -> list[int]:
    """Dimensions that are huge in nearly all hidden states of first tokens.

    Args:
        hidden: [N, L, D] of N prompts and L layers.
        tau: A dimension is huge above tau times the root mean square.
        max_dims: Most dimensions.
        share: Of the pairs of prompt and layer in which a dimension must be huge.

    Returns:
        The dimensions, the largest on average first; empty if there is none.
    """
    values = hidden.abs() * (hidden.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    often = (values > tau).float().mean((0, 1)) >= share
    order = torch.where(often, values.mean((0, 1)), -1.0).argsort(descending=True)
    return [int(d) for d in order[: min(max_dims, int(often.sum()))]]


def random_prompts(vocab_size: int, begin: int | None) -> Tensor:
    """Eight prompts of sixteen random tokens, int64 [8, 16], behind the token ``begin`` if there is one."""
    ids = torch.randint(0, vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    if begin is not None:
        ids[:, 0] = begin
    return ids


def _first_tokens(model: Any, inputs: Mapping[str, Any], blocks: Sequence[Any]) -> Tensor:
    """What enters some layers at the first token that is no padding, float32 [B, layers, D]."""
    found: list[Tensor] = []
    mask = inputs.get("attention_mask")
    first = None if mask is None else mask.to(torch.int64).argmax(1)

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        at = torch.zeros(len(hidden), dtype=torch.int64) if first is None else first
        found.append(hidden[torch.arange(len(hidden)), at.to(hidden.device)].float())

    hooks = [block.register_forward_pre_hook(look, with_kwargs=True) for block in blocks]
    try:
        model(**{"use_cache": False, **inputs})
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found, 1)


def _prompts(model: Any) -> Tensor:
    """Eight prompts of random tokens, behind the one that begins all prompts if the model has such a token."""
    config = text_config(model)
    begin = config.bos_token_id
    ids = random_prompts(config.vocab_size, begin if isinstance(begin, int) else None)
    special = [getattr(model.config, n, None) for n in ("image_token_id", "video_token_id")]
    for token in special:
        if isinstance(token, int):
            ids[ids == token] = int(ids[0, 0])
    return ids.to(model.device)

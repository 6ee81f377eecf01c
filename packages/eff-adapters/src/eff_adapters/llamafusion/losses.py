"""The two losses and the positions of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def positions(input_ids: Tensor, attention_mask: Tensor | None, cache: Any) -> Tensor:
    """Positions int64 [batch, tokens] of new tokens: text and picture tokens alike take one each, padding none."""
    batch, length = input_ids.shape
    past = 0 if cache is None else int(cache.get_seq_length())
    if attention_mask is None:
        return torch.arange(past, past + length, device=input_ids.device).expand(batch, -1)
    if attention_mask.shape != (batch, past + length):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}; use [{batch}, {past + length}], all tokens"
        )
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def language(
    logits: Tensor, labels: Tensor | None, is_picture: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Next-token cross-entropy in float32: mean over all text targets, and over those of each row [batch].

    A target counts where it and the token before it are text: the token that closes a picture is not predicted, nor is
    the first token of a row from padding.
    """
    if labels is None:
        return None, None
    left_out = is_picture[:, 1:] | is_picture[:, :-1]
    if attention_mask is not None:
        left_out = left_out | ~attention_mask[:, -labels.shape[1] :].bool()[:, :-1]
    targets = labels[:, 1:].masked_fill(left_out, -100)
    counted = targets != -100  # nothing is computed for the rest: a row of the vocabulary is large
    each = logits.new_zeros(targets.shape, dtype=torch.float32)
    found = functional.cross_entropy(logits[:, :-1][counted].float(), targets[counted], reduction="none")
    each = each.masked_scatter(counted, found)
    rows = each.sum(1) / counted.sum(1).clamp(min=1)
    return each.sum() / counted.sum().clamp(min=1), rows


def errors(written: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each picture [n, ...] in float32, [n]."""
    return (written.float() - wanted.float()).square().flatten(1).mean(1)


def diffusion(written: Tensor, wanted: Tensor, chosen: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Mean squared error in float32 over all elements of the chosen pictures, and of each of them."""
    if not chosen.any():
        return None, None
    each = errors(written[chosen], wanted[chosen])
    return each.mean(), each


def total(language: Tensor | None, diffusion: Tensor | None, weight: float) -> Tensor | None:
    """Language + weight * diffusion, of what there is."""
    if language is None:
        return None if diffusion is None else weight * diffusion
    return language if diffusion is None else language + weight * diffusion

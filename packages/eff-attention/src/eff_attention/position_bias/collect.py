"""The rollout of a real model, layer by layer, without keeping its maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, decoder_attention, observe_attention, rows
from torch import Tensor, nn

from eff_attention.position_bias.rollout import Rollout


@torch.no_grad()
def walk_layers(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, visit: Callable[[int, Tensor], None]
) -> None:
    """Run a decoder once and show each layer's weights while it runs.

    Args:
        model: A decoder of transformers.
        input_ids: [B, n].
        attention_mask: [B, n], 0 for padding on either side.
        visit: Gets a layer's number and its weights [B, H, n, n].

    Raises:
        ValueError: attention of the decoder cannot be reached.
    """
    names = decoder_attention(model)
    if not names:
        raise ValueError(f"{type(model).__name__} has no decoder whose attention can be read")
    numbers = {name: i for i, name in enumerate(names)}

    def record(call: AttentionCall, output: AttentionOutput) -> None:
        visit(numbers[call.name], rows(call, slice(None)))

    was_training = model.training
    model.eval()
    arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    try:
        with observe_attention(model, record, where=names, own_thread=True, strict=True):
            model(**arguments)
    finally:
        model.train(was_training)


def collect_rollout(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, residual: float = 0.0
) -> list[Tensor]:
    """Rollout after each layer of a language model, heads averaged, float32 [B, n, n] each.

    Padding is taken out: rows and columns of padded tokens are zero, and the other rows add up to 1. The memory is that
    of the results; no map of single heads is kept.

    Args:
        model: A decoder of transformers; it runs once.
        input_ids: [B, n].
        attention_mask: [B, n], 0 for padding on either side.
        residual: See `Rollout`.

    Raises:
        ValueError: attention of the decoder cannot be reached.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    both = real[:, :, None] & real[:, None, :]
    rollout, values = Rollout(residual), []

    def visit(layer: int, weights: Tensor) -> None:
        mean = weights.mean(1) * both
        rollout.add(mean / mean.sum(-1, keepdim=True).clamp_min(1e-30))
        values.append((rollout.value * both).float())

    walk_layers(model, input_ids, attention_mask, visit)
    return values

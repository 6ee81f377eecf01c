"""What the paper measures on attention maps, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels import Handle
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, observe_attention
from torch import Tensor, nn

from eff_attention.variants.context import decoder_of


@dataclass(frozen=True, slots=True)
class Indicators:
    """Of one layer, averaged over batch and heads.

    Attributes:
        entropy: - sum a log a over the whole map.
        concentration: Frobenius norm of the map.
        diversity: Standard deviation over the heads (1 / H), averaged over the L (L + 1) / 2 causal entries.
        sink: Mean weight of the first token.
        local_focus: Mean of the N-th sub-diagonal for N = 0, 1, 2, 3, over its L - N entries; NaN if it has none.
    """

    entropy: float
    concentration: float
    diversity: float
    sink: float
    local_focus: tuple[float, float, float, float]


def attention_indicators(maps: Mapping[int, Tensor] | Sequence[Tensor]) -> dict[int, Indicators]:
    """The indicators of each layer.

    Args:
        maps: Causal maps [B, H, L, L] by layer, as `attention_maps` gives them; a sequence is counted from 1.

    Raises:
        ValueError: a map is not square or has no token.
    """
    layers = maps.items() if isinstance(maps, Mapping) else enumerate(maps, 1)
    return {i: _indicators(a.double()) for i, a in layers}


def attention_maps(model: nn.Module, **inputs: Any) -> dict[int, Tensor]:
    """The map [B, H, L, L] of each layer that has one, counted from 1, for the inputs of the model.

    Layers with standard attention run as they are, and their maps are computed beside them, in float32.
    """
    decoder: Any = decoder_of(model)
    weights: dict[int, Tensor] = {}
    standard = {layer.self_attn for layer in decoder.layers if not hasattr(layer.self_attn, "settings")}
    mixers = len(standard) < len(decoder.layers)

    def keep(call: AttentionCall, output: AttentionOutput) -> None:
        if call.layer is not None and output.weights is not None:
            weights[call.layer] = output.weights

    look = (
        observe_attention(
            decoder, keep, where=lambda name, module: module in standard, needs=("weights",), own_thread=True
        )
        if standard
        else Handle()
    )
    with look, torch.no_grad():
        decoder(**{**inputs, "use_cache": False, **({"variant_weights": weights} if mixers else {})})
    return {i + 1: weights[i] for i in sorted(weights)}


def _indicators(a: Tensor) -> Indicators:
    length = a.size(-1)
    if a.dim() != 4 or a.size(-2) != length or length == 0:
        raise ValueError(f"a map must be [B, H, L, L] with L > 0, got {list(a.shape)}")
    causal = a.new_ones(length, length).tril().bool()
    spread = a.std(1, correction=0)[:, causal]
    diagonals = [a.diagonal(-n, -2, -1) for n in range(4)]
    return Indicators(
        entropy=float(-torch.special.xlogy(a, a).sum((-1, -2)).mean()),
        concentration=float(torch.linalg.matrix_norm(a).mean()),
        diversity=float(spread.mean()),
        sink=float(a[..., 0].mean()),
        local_focus=tuple(float(d.mean()) if d.numel() else float("nan") for d in diagonals),  # type: ignore[arg-type]
    )

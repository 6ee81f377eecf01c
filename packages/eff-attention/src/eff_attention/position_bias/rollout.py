"""Cumulative influence: the product of the layers' attention, kept as one matrix (section 2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from eff_attention.position_bias.graphs import MaskSpec


class Rollout:
    """The product ``A_t ... A_1`` while layers come in, in float64: two matrices at a time, however many layers.

    Args:
        residual: Share a of the residual stream: each layer counts as ``a I + (1 - a) A``.
    """

    def __init__(self, residual: float = 0.0) -> None:
        if not 0 <= residual < 1:
            raise ValueError(f"residual must be from 0 to below 1, got {residual}")
        self.residual = residual
        self.depth = 0
        self._product: Tensor | None = None

    def add(self, attention: Tensor) -> None:
        """Take in the next layer's attention [..., n, n].

        Raises:
            ValueError: it is not square, or its rows do not add up to 1; rows of nothing but zeros (padding) may.
        """
        if attention.ndim < 2 or attention.size(-1) != attention.size(-2):
            raise ValueError(f"attention must be [..., n, n], got {list(attention.shape)}")
        a = attention.double()
        sums = a.sum(-1)
        if bool((((sums - 1).abs() > 1e-2) & (sums != 0)).any()) or bool((a < 0).any()):
            raise ValueError("rows of attention must add up to 1 and not be negative")
        eye = torch.eye(a.size(-1), dtype=a.dtype, device=a.device)
        layer = self.residual * eye + (1 - self.residual) * a
        self._product = layer if self._product is None else layer @ self._product
        self.depth += 1

    @property
    def value(self) -> Tensor:
        """The product, float64 [..., n, n]: row i is what token i is made of.

        Raises:
            ValueError: no layer has come in.
        """
        if self._product is None:
            raise ValueError("no layer has been added")
        return self._product


def attention_rollout(layers: Iterable[Tensor], *, residual: float = 0.0) -> Tensor:
    """The product of layers [..., n, n], first layer first; see `Rollout`."""
    rollout = Rollout(residual)
    for layer in layers:
        rollout.add(layer)
    return rollout.value


def simulate_rollout(
    mask: MaskSpec | Tensor,
    n: int,
    depth: int,
    *,
    decay: float = 0.0,
    residual: float = 0.0,
    content: Tensor | None = None,
) -> list[Tensor]:
    """What attention with a given mask does through ``depth`` layers, after each of them [n, n].

    Args:
        mask: Kind of mask, or bool [n, n].
        n: Tokens.
        depth: Layers.
        decay: Slope m of a bias ``-m (i - j)`` on the logits (ALiBi).
        residual: See `Rollout`.
        content: Logits of the content [n, n], or [depth, n, n] for each layer; zeros without.

    Raises:
        ValueError: shapes do not fit, or a token sees nobody.
    """
    visible = mask.mask(n) if isinstance(mask, MaskSpec) else mask
    if visible.shape != (n, n) or not bool(visible.any(1).all()):
        raise ValueError(f"the mask must be bool [{n}, {n}] with at least one True in each row")
    place = torch.arange(n, dtype=torch.float64)
    bias = -decay * (place[:, None] - place).abs()
    logits = torch.zeros(depth, n, n, dtype=torch.float64) if content is None else content.double().expand(depth, n, n)
    rollout, values = Rollout(residual), []
    for layer in logits:
        rollout.add((layer + bias).masked_fill(~visible, -torch.inf).softmax(-1))
        values.append(rollout.value)
    return values

"""Where the later sinks of a model are: how many each head has, and which tokens they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from eff_kernels.edit import Record
from numpy.typing import NDArray
from torch import Tensor

from eff_attention.sink_calibration.apply import apply_act
from eff_attention.sink_calibration.config import ACTConfig
from eff_attention.sink_calibration.frame import Pass
from eff_attention.sink_calibration.rule import ARGUMENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TokenSinks:
    """One token that is a sink.

    Attributes:
        row: Sequence of the batch.
        place: Its place in the sequence, padding included.
        token: Its id.
        text: The id as text, if there was a way to tell.
        heads: Heads for which it is a sink.
        attention: Largest mean weight that one of them gives it.
    """

    row: int
    place: int
    token: int
    text: str
    heads: int
    attention: float


@dataclass(frozen=True, slots=True)
class SinkReport(Record):
    """Sinks of a model on some text.

    Attributes:
        sinks: Sinks of each layer and head, mean over sequences, float32 [L, H]; NaN where nothing was looked at.
        mass: Weight that a query gives them, mean over queries, float32 [L, H].
        tokens: The tokens that are sinks for the most heads.
    """

    sinks: NDArray[np.float32]
    mass: NDArray[np.float32]
    tokens: tuple[TokenSinks, ...] = field(default_factory=tuple)

    def summary(self) -> str:
        """A line for each layer that was looked at, then one for each token."""
        lines = ["layer  sinks  mass  heaviest head"]
        for layer in range(len(self.sinks)):
            if not np.isnan(self.sinks[layer]).all():
                head = int(np.nanargmax(self.mass[layer]))
                sinks, mass = float(np.nanmean(self.sinks[layer])), float(np.nanmean(self.mass[layer]))
                lines.append(f"{layer:5d}  {sinks:5.2f}  {mass:.2f}  {head} ({self.mass[layer, head]:.2f})")
        lines += [
            f"row {t.row}, place {t.place}: {t.text or t.token!r}, {t.heads} heads, up to {t.attention:.2f}"
            for t in self.tokens
        ]
        return "\n".join(lines)


@torch.no_grad()
def sink_report(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    config: ACTConfig | None = None,
    decode: Callable[[list[int]], str] | None = None,
    top: int = 20,
) -> SinkReport:
    """Look for sinks in one pass that changes nothing.

    Args:
        model: A decoder, see `apply_act`.
        input_ids: int64 [B, n].
        attention_mask: 0 at padding [B, n]; None for none.
        config: What a sink is and where to look; ``beta`` and ``decode`` mean nothing here.
        decode: Turns ids to text, such as ``tokenizer.decode``.
        top: Tokens to list.

    Raises:
        ValueError: shapes do not fit, or see `apply_act`.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.dim() != 2 or mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids and attention_mask must be [B, n], got {list(input_ids.shape)}, {list(mask.shape)}"
        )
    config = dataclasses.replace(config or ACTConfig(), beta=1.0, decode="running", model_hash=None)
    settings = model.config.get_text_config()
    shape = settings.num_hidden_layers, settings.num_attention_heads
    sinks, mass = (np.full(shape, np.nan, np.float32) for _ in range(2))
    seen = Pass()

    def hand_down(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, ARGUMENT: seen}

    # Before the hook of the calibration, which leaves a pass that is there alone.
    hook = model.base_model.register_forward_pre_hook(hand_down, with_kwargs=True, prepend=True)
    try:
        with apply_act(model, config) as handle:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            model.base_model(input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
    finally:
        hook.remove()
    for head in handle.stats():
        sinks[head.layer, head.head], mass[head.layer, head.head] = head.sinks, head.mass
    count = torch.zeros(input_ids.shape, dtype=torch.int64, device=input_ids.device)
    weight = torch.zeros(input_ids.shape, device=input_ids.device)
    for state in seen.states.values():
        at = state.sinks.to(input_ids.device)
        mean = (state.sums / state.rows.clamp(min=1)[:, None]).to(input_ids.device)
        count += at.sum(1)
        weight = torch.maximum(weight, torch.where(at, mean, 0.0).amax(1))
    order = sorted(count.nonzero().tolist(), key=lambda at: (-int(count[tuple(at)]), *at))[:top]
    tokens = [
        TokenSinks(
            row, place, token := int(input_ids[row, place]), "" if decode is None else decode([token]),
            int(count[row, place]), float(weight[row, place]),
        )
        for row, place in order
    ]  # fmt: skip
    return SinkReport(sinks, mass, tuple(tokens))

"""Where a model looks in a picture while it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, decoder_attention, observe_attention, rows
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ImageAttention:
    """Attention to one picture, for each generated token.

    Attributes:
        maps: Mean over heads of the weights of the query that predicts token t, float32 [T, L, N]; not normalised.
        grid: Rows and columns of the picture's N tokens.
        ids: Generated tokens [T].
        layers: Which decoder layers the L maps are of.
    """

    maps: Tensor
    grid: tuple[int, int]
    ids: Tensor
    layers: tuple[int, ...]


@torch.no_grad()
def record_image_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 32,
    picture: int = 0,
) -> ImageAttention:
    """Generate greedily from one prompt and keep the attention of each step's last query to a picture.

    The answer is that of plain greedy generation. Only the rows asked for are computed beside the model's own
    attention, and only the picture's columns are kept.

    Args:
        model: A vision-language model with ``generate``.
        inputs: What its processor gives, for one prompt.
        layers: Decoder layers; None takes the six around 0.7 of the depth.
        max_new_tokens: Most tokens to generate.
        picture: Which picture of the prompt.

    Raises:
        ValueError: several prompts, no picture, or a layer that does not exist.
    """
    if inputs["input_ids"].size(0) != 1:
        raise ValueError(f"one prompt at a time, got {inputs['input_ids'].size(0)}")
    names = decoder_attention(model)
    chosen = default_layers(len(names)) if layers is None else tuple(range(len(names))[i] for i in layers)
    kept: list[Tensor] = []
    grids: list[tuple[int, int]] = []

    def record(call: AttentionCall, output: AttentionOutput) -> None:
        if call.roles is None:
            raise ValueError(f"{call.name} does not know its tokens, so that the picture cannot be found")
        keys = call.roles.keys
        # The whole picture where a family also cuts it into parts.
        here = (keys.picture[0] == picture) & (keys.part[0] == 0) & (keys.row[0] >= 0) & (keys.column[0] >= 0)
        if not bool(here.any()):
            raise ValueError(f"the prompt has no picture {picture} whose grid is known")
        grids.append(keys.grid(0, picture))
        height, width = grids[-1]
        place = keys.row[0, here].long() * width + keys.column[0, here].long()
        whole = torch.zeros(height * width, device=place.device)
        kept.append(whole.index_add(0, place, rows(call, [-1]).mean(1)[0, 0, here].float()))

    generate: Any = model.generate
    where = [names[i] for i in chosen]
    with observe_attention(model, record, where=where, needs=("roles",), strict=True):
        out = generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=False
        )
    count = len(kept) // len(chosen)
    maps = torch.stack(kept).unflatten(0, (count, len(chosen)))
    return ImageAttention(maps, grids[0], out[0, -count:], chosen)


def default_layers(depth: int) -> tuple[int, ...]:
    """Six layers around 0.7 of the depth, or all of a smaller model."""
    first = max(0, min(depth - 6, round(0.7 * depth) - 3))
    return tuple(range(first, min(depth, first + 6)))

"""Where a model looks in a picture while it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels.edit.attention import AttentionCall, AttentionOutput, decoder_attention, observe_attention, rows
from torch import Tensor, nn

from eff_attention.layers import attention_types


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


def record_image_attention(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 32,
    picture: int = 0,
) -> ImageAttention:
    """`record_image_attentions` of one prompt.

    Raises:
        ValueError: several prompts, no picture, or a layer that does not exist.
    """
    if inputs["input_ids"].size(0) != 1:
        raise ValueError(f"one prompt at a time, got {inputs['input_ids'].size(0)}")
    return record_image_attentions(model, inputs, layers, max_new_tokens=max_new_tokens, picture=picture)[0]


@torch.no_grad()
def record_image_attentions(
    model: nn.Module,
    inputs: Mapping[str, Any],
    layers: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 32,
    picture: int = 0,
) -> list[ImageAttention]:
    """Generate greedily and keep the attention of each step's last query to one picture of each prompt.

    The answers are those of plain greedy generation. Only the rows asked for are computed beside the model's own
    attention, and only the picture's columns are kept. Each prompt has as many maps as its answer has tokens, its end
    included, whatever the others say.

    Args:
        model: A vision-language model with ``generate``.
        inputs: What its processor gives; of several prompts the shorter ones are padded on the left.
        layers: Decoder layers; None takes six with full attention around 0.7 of the depth.
        max_new_tokens: Most tokens to generate.
        picture: Which picture of each prompt.

    Raises:
        ValueError: a prompt without that picture, a layer whose window lost it, or one that does not exist.
    """
    names = decoder_attention(model)
    host: Any = model  # with what transformers' mixins add
    if layers is not None and (wrong := [i for i in layers if not -len(names) <= i < len(names)]):
        raise ValueError(f"layers {wrong} do not exist; the model has 0..{len(names) - 1}")
    chosen = (
        default_layers(len(names), attention_types(host.config.get_text_config()))
        if layers is None
        else tuple(range(len(names))[i] for i in layers)
    )
    count = inputs["input_ids"].size(0)
    kept: list[list[Tensor]] = [[] for _ in range(count)]
    grids: list[tuple[int, int]] = [(0, 0)] * count

    def record(call: AttentionCall, output: AttentionOutput) -> None:
        if call.roles is None:
            raise ValueError(f"{call.name} does not know its tokens, so that the picture cannot be found")
        keys, weights = call.roles.keys, rows(call, [-1]).mean(1)[:, 0].float()
        for row in range(count):
            # The whole picture where a family also cuts it into parts.
            here = (
                (keys.picture[row] == picture) & (keys.part[row] == 0) & (keys.row[row] >= 0) & (keys.column[row] >= 0)
            )
            if not bool(here.any()):
                raise ValueError(f"prompt {row} has no picture {picture} whose grid is known in {call.name}")
            height, width = keys.grid(row, picture)
            place = keys.row[row, here].long() * width + keys.column[row, here].long()
            grids[row] = height, width
            whole = torch.zeros(height * width, device=place.device)
            kept[row].append(whole.index_add(0, place, weights[row, here]))

    where = [names[i] for i in chosen]
    with observe_attention(model, record, where=where, needs=("roles",), own_thread=True, strict=True):
        out = host.generate(  # as it is inside, where it notes the sizes of pictures
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, return_dict_in_generate=False
        )
    found, stops = [], _ends(host, inputs["input_ids"].device)
    for row in range(count):
        ids = out[row, -(len(kept[row]) // len(chosen)) :]
        ends = torch.isin(ids, stops).nonzero()
        said = int(ends[0]) + 1 if len(ends) else len(ids)
        maps = torch.stack(kept[row]).unflatten(0, (len(ids), len(chosen)))
        found.append(ImageAttention(maps[:said], grids[row], ids[:said], chosen))
    return found


def _ends(model: Any, device: torch.device) -> Tensor:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.long, device=device).flatten()


def default_layers(depth: int, kinds: Sequence[str] | None = None) -> tuple[int, ...]:
    """Six layers around 0.7 of the depth, or all of a smaller model.

    Args:
        depth: Layers of the decoder.
        kinds: Of each layer; where some have full attention, only those count, as others lose sight of the picture.
    """
    full = [i for i in range(depth) if kinds is None or kinds[i] == "full_attention"] or list(range(depth))
    middle = round(0.7 * depth)
    first = max(0, min(len(full) - 6, sum(i < middle for i in full) - 3))
    return tuple(full[first : first + 6])

"""Rows of text and pictures: packing them, checking them, and drawing their time steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from eff_adapters.llamafusion.config import ModalityTowerConfig

Part = Tensor
"""A part of a row: text as int64 [tokens], or a picture's latents as float [c, s, s]."""


class Batch(TypedDict):
    """Arguments of a tower's forward."""

    input_ids: Tensor
    modality_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    latents: Tensor | None
    image_first: Tensor | None


def pack(
    samples: Sequence[Sequence[Part]],
    config: ModalityTowerConfig,
    *,
    pad_token_id: int = 0,
    padding_side: Literal["left", "right"] = "right",
    generator: torch.Generator | None = None,
) -> Batch:
    """Lay rows of parts out as one batch: ``text <BOI> picture <EOI> text``, each text token but padding a target.

    Where a picture follows text, that text is left out with the chance ``caption_dropout``, if there is a generator.

    Args:
        samples: Rows of parts; a picture before all text is one that is read.
        config: Of the tower.
        pad_token_id: Id of padding.
        padding_side: Where padding goes.
        generator: Draws which captions are left out; None leaves none out.

    Raises:
        TypeError: a part is neither ids nor latents.
        ValueError: latents have another shape than the config says.
    """
    rows: list[tuple[list[int], list[int]]] = []
    pictures: list[Tensor] = []
    first: list[bool] = []
    for sample in samples:
        ids: list[int] = []
        modality: list[int] = []
        for i, part in enumerate(sample):
            if part.dim() == 1 and not part.is_floating_point():
                before = i + 1 < len(sample) and sample[i + 1].dim() == 3 and generator is not None
                if before and float(torch.rand((), generator=generator)) < config.caption_dropout:
                    continue
                ids += part.tolist()
                modality += [0] * len(part)
            elif part.is_floating_point():
                if part.shape != config.latent_shape:
                    raise ValueError(f"latents have shape {list(part.shape)}; use {list(config.latent_shape)}")
                n = config.tokens_per_image
                ids += [config.boi_token_id, *[pad_token_id] * n, config.eoi_token_id]
                modality += [0, *[1] * n, 0]
                pictures.append(part)
                first.append(not any(p.dim() == 1 for p in sample[:i]))
            else:
                raise TypeError(f"a part is {part.dtype} {list(part.shape)}; use ids int64 [n] or latents [c, s, s]")
        rows.append((ids, modality))
    width = max(len(ids) for ids, _ in rows)

    def padded(row: list[int], value: int) -> list[int]:
        gap = [value] * (width - len(row))
        return gap + row if padding_side == "left" else row + gap

    all_ids = torch.tensor([padded(ids, pad_token_id) for ids, _ in rows])
    modalities = torch.tensor([padded(m, 0) for _, m in rows])
    mask = torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows])
    return Batch(
        input_ids=all_ids,
        modality_ids=modalities,
        attention_mask=mask,
        labels=all_ids.masked_fill((mask == 0) | (modalities == 1), -100),
        latents=torch.stack(pictures) if pictures else None,
        image_first=torch.tensor(first) if pictures else None,
    )


def check_layout(
    input_ids: Tensor,
    blocks: Tensor,
    attention_mask: Tensor | None,
    latents: Tensor | None,
    config: ModalityTowerConfig,
    cache: Any,
) -> None:
    """Refuse rows whose markers, blocks, padding or latents do not fit each other."""
    if input_ids.shape != blocks.shape:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}, modality_ids {list(blocks.shape)}")
    is_picture = blocks >= 0
    starts = is_picture & (blocks != torch.nn.functional.pad(blocks, (1, 0), value=-1)[:, :-1])
    opens = (input_ids == config.boi_token_id) & ~is_picture
    wanted = torch.nn.functional.pad(opens, (1, 0), value=cache is not None)[:, :-1]  # its marker may be in the cache
    if (starts & ~wanted).any():
        raise ValueError(f"a block of picture tokens has no opening marker ({config.boi_token_id}) before it")
    if (opens & ~torch.nn.functional.pad(starts, (0, 1))[:, 1:]).any():
        raise ValueError(f"an opening marker ({config.boi_token_id}) has no block of picture tokens behind it")
    count = int(starts.sum())
    if (0 if latents is None else len(latents)) != count:
        raise ValueError(f"modality_ids holds {count} pictures, latents {0 if latents is None else len(latents)}")
    if latents is not None and tuple(latents.shape[1:]) != config.latent_shape:
        raise ValueError(f"latents have shape {list(latents.shape[1:])}; use {list(config.latent_shape)}")
    if attention_mask is not None:
        mask = attention_mask.bool()
        if (is_picture & ~mask[:, -blocks.shape[1] :]).any():
            raise ValueError("attention_mask hides picture tokens; padding is text")
        left, right = ~mask[:, 0], ~mask[:, -1]
        if left.any() and right.any():
            raise ValueError("some rows are padded on the left and some on the right; pad all on one side")


def times_of_training(
    timesteps: Tensor | None,
    clean: Tensor,
    image_first: Tensor | None,
    blocks: Tensor,
    attention_mask: Tensor | None,
    config: ModalityTowerConfig,
    generator: torch.Generator | None,
) -> Tensor:
    """Time steps int64 [pictures]: those given, or drawn evenly; 0 for clean pictures."""
    if timesteps is None:
        most = torch.full(clean.shape, config.num_train_timesteps, device=clean.device)
        first = _nothing_before(blocks, attention_mask) if image_first is None else image_first
        limit = min(config.max_t_when_image_first + 1, config.num_train_timesteps)
        most = torch.where(first.to(clean.device), limit, most)
        device = generator.device if generator else "cpu"
        drawn = torch.rand(clean.shape, generator=generator, device=device, dtype=torch.float64)
        timesteps = (drawn.to(clean.device) * most).long().clamp(max=most - 1)
    if timesteps.shape != clean.shape or timesteps.is_floating_point():
        raise ValueError(f"timesteps is {timesteps.dtype} {list(timesteps.shape)}; use int64 [{len(clean)}]")
    if ((timesteps < 0) | (timesteps >= config.num_train_timesteps)).any():
        raise ValueError(f"timesteps={timesteps.tolist()}; use 0 to {config.num_train_timesteps - 1}")
    return timesteps.to(clean.device).masked_fill(clean, 0)


def _nothing_before(blocks: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Whether no text stands before a picture but its marker and one token that begins the row; bool [pictures]."""
    starts = (blocks >= 0) & (blocks != torch.nn.functional.pad(blocks, (1, 0), value=-1)[:, :-1])
    real = torch.ones_like(starts) if attention_mask is None else attention_mask[:, -blocks.shape[1] :].bool()
    text = (real & (blocks < 0)).cumsum(1)
    return text[starts] <= 2

"""Causal for text, bidirectional within a picture: which keys a query may see (LMFusion, section 3.1)."""

from __future__ import annotations

from typing import Any

import torch
from eff_kernels.edit.caches import cache_name
from torch import Tensor


def picture_blocks(modality_ids: Tensor, tokens_per_image: int | None = None) -> Tensor:
    """Number the pictures of each row: int64 [batch, tokens], -1 for text, then 0, 1, ... from left to right.

    Args:
        modality_ids: [batch, tokens], 0 text and 1 picture.
        tokens_per_image: Length of a picture, at which a longer run of picture tokens is cut into several; None takes
            each run as one picture.

    Raises:
        ValueError: ids are other than 0 and 1, or a run is not a multiple of ``tokens_per_image``.
    """
    if modality_ids.dim() != 2:
        raise ValueError(f"modality_ids has shape {list(modality_ids.shape)}; use [batch, tokens]")
    is_picture = modality_ids == 1
    if not (is_picture | (modality_ids == 0)).all():
        raise ValueError(f"modality_ids holds {modality_ids.unique().tolist()}; use 0 for text and 1 for pictures")
    before = torch.nn.functional.pad(is_picture, (1, 0))[:, :-1]
    starts = is_picture & ~before
    if tokens_per_image is not None:
        place = torch.arange(modality_ids.shape[1], device=modality_ids.device).expand_as(modality_ids)
        since = place - torch.where(starts, place, 0).cummax(1).values
        after = torch.nn.functional.pad(is_picture, (0, 1))[:, 1:]
        lengths = since[is_picture & ~after] + 1
        if (lengths % tokens_per_image).any():
            raise ValueError(f"picture blocks have lengths {lengths.tolist()}; use {tokens_per_image} tokens a picture")
        starts = is_picture & (since % tokens_per_image == 0)
    return torch.where(is_picture, starts.cumsum(1) - 1, -1)


def modality_attention_mask(
    modality_ids: Tensor, attention_mask: Tensor | None = None, *, tokens_per_image: int | None = None
) -> Tensor:
    """True where a query may see a key: earlier ones, itself, and all of its own picture; never padding.

    Args:
        modality_ids: [batch, tokens], 0 text and 1 picture.
        attention_mask: [batch, tokens], 0 at padding.
        tokens_per_image: As in `picture_blocks`.

    Returns:
        bool [batch, 1, tokens, tokens].
    """
    blocks = picture_blocks(modality_ids, tokens_per_image)
    length = blocks.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    allowed = causal | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None])
    if attention_mask is not None:
        allowed = allowed & attention_mask.bool()[:, None, :]
    return allowed[:, None]


def host_mask(
    config: Any, embeds: Tensor, attention_mask: Tensor | None, cache: Any, position_ids: Tensor, blocks: Tensor
) -> Any:
    """The same mask in the form that the host's attention wants, keys of the cache and sliding windows included.

    Args:
        config: Of the decoder.
        embeds: [batch, new tokens, hidden].
        attention_mask: [batch, all tokens], 0 at padding, or None.
        cache: Of transformers, or None.
        position_ids: [batch, new tokens].
        blocks: From `picture_blocks`, of the new tokens.

    Raises:
        ValueError: the host's attention takes no such mask.
    """
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    if config._attn_implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(
            f"attention {config._attn_implementation!r} takes no mask that is bidirectional within pictures; "
            "use 'sdpa', 'eager' or 'flex_attention'"
        )
    past = cache.get_seq_length() if cache is not None else 0
    if attention_mask is None:  # else positions that start over in a row would be read as packed sequences
        attention_mask = embeds.new_ones(len(blocks), past + blocks.shape[1], dtype=torch.bool)
    arguments = {
        "config": config,
        "inputs_embeds": embeds,
        "attention_mask": attention_mask,
        cache_name(create_causal_mask): cache,
        "position_ids": position_ids,
        "block_sequence_ids": torch.nn.functional.pad(blocks, (past, 0), value=-1),
    }
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        return {
            "full_attention": create_causal_mask(**arguments),
            "sliding_attention": create_sliding_window_causal_mask(**arguments),
        }
    if getattr(config, "sliding_window", None) is not None:
        return create_sliding_window_causal_mask(**arguments)
    return create_causal_mask(**arguments)

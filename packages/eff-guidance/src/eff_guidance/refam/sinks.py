"""Tokens that every token looks at, wherever it is (global attention sinks, section 3 of the paper)."""

from __future__ import annotations

import torch
from torch import Tensor


def find_global_sinks(
    text_to_text: Tensor, maps: Tensor, valid: Tensor, *, mass: float = 4.0, variation: float = 0.5
) -> Tensor:
    """Which tokens are global sinks: they receive much of the text's attention, and their map is nearly flat.

    Token j receives the mean of ``text_to_text[i, j]`` over the other valid tokens i. It is a sink if that is above
    ``mass / (number of valid tokens)``, and deviation over mean of ``maps[:, j]`` is below ``variation``. With at most
    ``mass`` valid tokens, none can be one.

    Args:
        text_to_text: Attention of tokens to tokens, rows are queries, float [T, T].
        maps: Attention of patches to tokens, float [N, T].
        valid: False at padding, bool [T].
        mass: Times the even share.
        variation: Largest coefficient of variation of a flat map.

    Returns:
        bool [T].

    Raises:
        ValueError: shapes that do not fit each other.
    """
    count = valid.shape[0]
    if text_to_text.shape != (count, count) or maps.dim() != 2 or maps.shape[1] != count:
        raise ValueError(
            f"{count} tokens, but text_to_text is {list(text_to_text.shape)} and maps are {list(maps.shape)}; "
            f"wanted [{count}, {count}] and [N, {count}]"
        )
    valid = valid.to(maps.device)
    others = valid[:, None] & valid[None, :] & ~torch.eye(count, dtype=torch.bool, device=maps.device)
    received = (text_to_text * others).sum(0) / others.sum(0).clamp(min=1)
    mean = maps.mean(0)
    spread = torch.where(mean > 0, maps.std(0, correction=0) / mean.clamp(min=1e-12), torch.inf)
    return valid & (received > mass / max(1, int(valid.sum()))) & (spread < variation)

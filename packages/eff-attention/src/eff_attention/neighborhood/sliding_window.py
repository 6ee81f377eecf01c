"""Causal neighborhood attention on a line is sliding-window attention: an attention implementation for transformers.

A prompt runs on the operation, in time and memory linear in its length, padded batches sequence by sequence. All else
(decoding with a cache, packed sequences, other masks) gets the dense mask that transformers makes for it, and SDPA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels import Handle
from torch import Tensor

from eff_attention.neighborhood.functional import neighborhood_attention


def register_sliding_window(name: str = "eff_sliding_window") -> Handle:
    """Register the attention and its mask function, for ``attn_implementation=name``.

    Layers without a sliding window see the whole causal past. A mask function is registered with it, since transformers
    gives an attention without one no mask at all.

    Returns:
        A handle whose ``remove()`` takes both registrations back.

    Raises:
        ValueError: the name is taken.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    handle = Handle()
    for registry, function in ((AttentionInterface, _attention), (AttentionMaskInterface, _mask)):
        mapping: dict[str, Any] = registry._global_mapping
        if name in mapping:
            handle.remove()
            raise ValueError(f"{name!r} is registered in transformers already; choose another name")
        registry.register(name, function)
        handle.on_remove(functools.partial(mapping.pop, name, None))
    return handle


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: str | torch.device = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """None for a prompt without padding, [B, L] for one with, a dense [B, 1, Lq, Lk] for all else."""
    from transformers.masking_utils import sdpa_mask

    plain = allow_is_causal_skip and q_length == kv_length and int(q_offset) == int(kv_offset) == 0
    if plain and _is_window(mask_function, q_length, local_size):
        if attention_mask is None:
            return None
        mask = attention_mask[:, :kv_length].bool()
        changes = (mask[:, 1:] != mask[:, :-1]).sum(1) + mask[:, 0] + mask[:, -1]
        if mask.size(1) == kv_length and bool((changes == 2).all()):  # one run of real tokens in each row
            return None if bool(mask.all()) else mask
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        device=device, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip


def _is_window(mask_function: Callable[..., Tensor], length: int, window: int | None) -> bool:
    """Whether a mask of transformers is the causal window; rows that would tell chunks from windows are looked at."""
    window = min(window or length, length)
    key, zero = torch.arange(length), torch.tensor(0)
    for i in {0, min(window, length - 1), length - 1}:
        seen = mask_function(zero, zero, torch.tensor(i), key)
        if not torch.equal(torch.as_tensor(seen).expand(length), (key <= i) & (key > i - window)):
            return False
    return True


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: [B, H, Lq, D] to [B, Lq, H, D]."""
    if dropout:
        raise NotImplementedError(f"sliding-window attention has no dropout on its weights, got {dropout}")
    if attention_mask is not None and attention_mask.dim() == 4:
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise NotImplementedError(
            "sliding-window attention is causal, and this layer is not; use another implementation"
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    if attention_mask is None:
        return _window(q, k, v, sliding_window, scaling), None
    rows = []
    for row, mask in enumerate(attention_mask):
        at = mask.nonzero()
        first, last = int(at[0]), int(at[-1]) + 1
        own = [t[row : row + 1, first:last] for t in (q, k, v)]
        part = _window(own[0], own[1], own[2], sliding_window, scaling)
        rows.append(F.pad(part, (0, 0, 0, 0, first, q.size(1) - last)))
    return torch.cat(rows), None


def _window(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Causal attention to the last ``window`` keys, [B, L, H, D]."""
    length = q.size(1)
    window = min(window or length, length)
    if window < 2:  # each token sees itself alone
        return v.repeat_interleave(q.size(2) // v.size(2), 2)
    out = neighborhood_attention(q, k, v, window, is_causal=True, scale=scale)
    assert isinstance(out, Tensor)
    return out

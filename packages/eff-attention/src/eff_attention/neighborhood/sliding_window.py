"""Causal neighborhood attention on a line is sliding-window attention: an attention implementation for transformers.

A prompt runs on the operation, in time and memory linear in its length, padded batches sequence by sequence. All else
(decoding with a cache, packed sequences, other masks) gets the dense mask that transformers makes for it, and SDPA.
Softcaps, biases and dropout on weights, which neither of them has, are computed in the open.

The mask of a prompt carries its window: uint8 [1, 1, 1, W], or [B, 1, L, W] with padding, whose last axis takes no
memory. Layers need not hand on a window of their own, and many do not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels import Handle
from eff_kernels.edit.attention import AttentionCall, dense
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
) -> Tensor:
    """Padding and window of a prompt, see the module; for all else a dense mask [B, 1, Lq, Lk]."""
    from transformers.masking_utils import sdpa_mask

    plain = allow_is_causal_skip and q_length == kv_length and int(q_offset) == int(kv_offset) == 0
    if plain and _is_window(mask_function, q_length, local_size):
        whole = torch.ones(1, 1, dtype=torch.bool, device=device)
        mask = whole if attention_mask is None else attention_mask[:, :kv_length].bool()
        changes = (mask[:, 1:] != mask[:, :-1]).sum(1) + mask[:, 0] + mask[:, -1]
        if mask is whole or (mask.size(1) == kv_length and bool((changes == 2).all())):  # one run of tokens in each row
            mask = whole if bool(mask.all()) else mask
            return mask.byte()[:, None, :, None].expand(-1, -1, -1, min(local_size or q_length, q_length))
    full = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size,
        device=device, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )  # fmt: skip
    assert full is not None  # as nothing may be skipped
    return full


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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: [B, H, Lq, D] to [B, Lq, H, D]."""
    if unknown := sorted(n for n, x in kwargs.items() if isinstance(x, Tensor) and n not in _NO_TERM):
        raise NotImplementedError(f"sliding-window attention does not know what {unknown} do to attention")
    call = AttentionCall(
        module, "", getattr(module, "layer_idx", None), query, key, value, attention_mask,
        query.size(-1) ** -0.5 if scaling is None else scaling, dropout=dropout, softcap=softcap, sinks=s_aux,
        bias=position_bias,
    )  # fmt: skip
    if attention_mask is None:  # not made by our function: what the layer says of itself holds
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        call = call.replace(causal=bool(causal) and query.size(2) > 1, window=sliding_window)
    elif attention_mask.dtype == torch.uint8:
        padding = attention_mask[:, 0, :, 0].bool() if attention_mask.size(2) > 1 else None
        call = call.replace(mask=padding, causal=True, window=attention_mask.size(3))
        if not dropout and softcap is None and position_bias is None:
            return _prompt(call), None
    return dense(call).out.transpose(1, 2).contiguous(), None


# Tensors that transformers' layers hand down beside queries, keys and values, and that say nothing of the weights.
_NO_TERM = ("position_ids", "cache_position", "position_embeddings", "num_items_in_batch")


def _prompt(call: AttentionCall) -> Tensor:
    """Causal attention with a window to the tokens of each row, [B, L, H, D]."""
    q, k, v = (t.to(call.dtype).transpose(1, 2) for t in (call.q, call.k, call.v))
    window = call.window or 1
    if call.mask is None:
        return _window(q, k, v, window, call)
    rows = []
    for row, mask in enumerate(call.mask):
        at = mask.nonzero()
        first, last = int(at[0]), int(at[-1]) + 1
        own = [t[row : row + 1, first:last] for t in (q, k, v)]
        part = _window(own[0], own[1], own[2], window, call)
        rows.append(F.pad(part, (0, 0, 0, 0, first, q.size(1) - last)))
    return torch.cat(rows)


def _window(q: Tensor, k: Tensor, v: Tensor, window: int, call: AttentionCall) -> Tensor:
    """Causal attention to the last ``window`` keys, [B, L, H, D]; learnt sinks take their share of the weights."""
    window = min(window, q.size(1))
    if window < 2:  # each token sees itself alone
        out, lse = v.repeat_interleave(q.size(2) // v.size(2), 2), None
        if call.sinks is not None:
            lse = (q * k.repeat_interleave(q.size(2) // k.size(2), 2)).float().sum(-1) * call.scale
    else:
        out, lse = neighborhood_attention(q, k, v, window, is_causal=True, scale=call.scale, return_lse=True)
    if call.sinks is None or lse is None:
        return out
    return out * torch.sigmoid(lse - call.sinks.float())[..., None].to(out.dtype)

"""What a call lets its queries see, whatever form the host's mask has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from eff_kernels.edit.attention.call import AttentionCall


def keep(call: AttentionCall, rows: Tensor | None = None) -> Tensor:
    """What is visible, bool, broadcasts to [B, H, q, Sk]."""
    mask = _of_host(call, rows)
    seen = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=call.q.device) if mask is None else _visible(mask)
    limits = _limits(call, rows)
    return seen if limits is None else seen & limits


def additive(call: AttentionCall, rows: Tensor | None = None) -> Tensor:
    """What is added to the logits, float32 (float64 where the mask or bias is), -inf where nothing is to be seen."""
    mask = _of_host(call, rows)
    total = torch.zeros((1, 1, 1, 1), device=call.q.device)
    for part in (mask if mask is not None and mask.dtype != torch.bool else None, _rows(call.bias, rows)):
        if part is not None:
            total = total + (part if part.dtype == torch.float64 else part.float())
    return total.masked_fill(~keep(call, rows), -torch.inf)


def _visible(mask: Tensor) -> Tensor:
    """Hosts write "hidden" as -inf or as the least number of a type, which sums may move a little."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _limits(call: AttentionCall, rows: Tensor | None) -> Tensor | None:
    """What causality and the window leave to the attention, [1, 1, q, Sk], or None for all."""
    windowed = call.window is not None and is_partial(call.mask)
    if not call.causal and not windowed:
        return None
    query = call.positions()
    query = (query if rows is None else query[rows])[:, None]
    key = torch.arange(call.num_keys, device=query.device)
    seen = torch.ones((query.shape[0], key.shape[0]), dtype=torch.bool, device=query.device)
    if call.causal:
        seen &= key <= query
    if windowed and call.window is not None:
        seen &= key > query - call.window
        if not call.causal:
            seen &= key < query + call.window
    return seen[None, None]


def is_partial(mask: Any) -> bool:
    """Whether a mask says nothing about windows: None and the padding masks [B, Sk] of flash attention."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_floating_point())


def _of_host(call: AttentionCall, rows: Tensor | None) -> Tensor | None:
    """The host's mask as a tensor that broadcasts to [B, H, q, Sk], boolean or additive."""
    mask = call.mask
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        return _of_flex(call, mask, rows)
    if is_partial(mask):
        return mask[:, None, None, -call.num_keys :].bool()
    while mask.dim() < 4:
        mask = mask[None]
    if mask.dtype != torch.bool and not mask.is_floating_point():
        mask = mask.bool()
    if mask.shape[-1] > call.num_keys:
        mask = mask[..., : call.num_keys]
    return _rows(mask, rows)


def _rows(mask: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return mask if mask is None or rows is None or mask.shape[-2] == 1 else mask[..., rows, :]


def _of_flex(call: AttentionCall, mask: Any, rows: Tensor | None) -> Tensor:
    if not hasattr(mask, "mask_mod"):
        raise TypeError(f"{call.name}: a mask of type {type(mask).__name__} cannot be read")
    device = call.q.device
    query = torch.arange(call.num_queries, device=device) if rows is None else rows
    batch, key = torch.arange(call.q.shape[0], device=device), torch.arange(call.num_keys, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    at = (batch[:, None, None, None], zero, query[:, None], key)
    return mask.mask_mod(*at).expand(call.q.shape[0], 1, query.shape[0], key.shape[0])

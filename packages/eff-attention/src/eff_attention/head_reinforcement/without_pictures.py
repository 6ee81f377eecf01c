"""The arguments of a decoder's pass as if its prompt had no pictures: tokens are dropped and the others renumbered.

Separators around pictures stay. What is dropped stands in front as padding, so that the last tokens stay the last.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from eff_kernels.edit.attention import Role, TokenRoles
from torch import Tensor

_TAKEN = (
    *("past_key_values", "cache", "cache_position", "position_ids"),
    *("attention_mask", "use_cache", "logits_to_keep"),
)
_OF_PICTURES = ("visual_pos_masks", "deepstack_visual_embeds")


def arguments(decoder: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pass by name, without those that eff's own hooks have added."""
    names = list(inspect.signature(inspect.unwrap(type(decoder).forward)).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return {n: x for n, x in given.items() if not n.startswith("eff_") and x is not None}


def without_pictures(decoder: Any, given: Mapping[str, Any], roles: TokenRoles) -> dict[str, Any]:
    """Arguments of the pass without pictures, as short as it can be.

    Args:
        decoder: The decoder.
        given: Its arguments, from `arguments`; the cache is empty.
        roles: Its tokens.
    """
    order, keep = _order(roles)
    count = max(1, int(keep.sum(1).max()))
    return _packed(decoder, given, order[:, -count:], keep[:, -count:])


def both(decoder: Any, given: Mapping[str, Any], roles: TokenRoles) -> dict[str, Any]:
    """Arguments of one pass of twice the rows: as given, and then without pictures."""
    order, keep = _order(roles)
    batch, length = order.shape
    bare = _packed(decoder, given, order, keep)
    out: dict[str, Any] = {"use_cache": False}
    for name, value in given.items():
        if name == "deepstack_visual_embeds":
            out[name] = value
        elif name == "visual_pos_masks":
            out[name] = torch.cat([value, torch.zeros_like(value)])
        elif name in bare and name not in _TAKEN:
            out[name] = torch.cat([value, bare[name]])
    place = torch.arange(length, device=order.device).expand(batch, length)
    own, packed = given.get("position_ids"), bare["position_ids"]
    own = place if own is None else own.expand(*own.shape[:-2], batch, length)
    out["position_ids"] = torch.cat([own, packed.expand_as(own)], -2)
    mask: Any = given.get("attention_mask")
    short = bare["attention_mask"]
    if isinstance(short, dict):
        out["attention_mask"] = {n: torch.cat([_square(mask[n], batch, length), m]) for n, m in short.items()}
    elif short.dim() == 4:
        out["attention_mask"] = torch.cat([_square(mask, batch, length), short])
    else:
        real = ~roles.queries.of(Role.PAD, Role.UNUSED)
        out["attention_mask"] = torch.cat([real.to(short.dtype), short])
    return out


def _order(roles: TokenRoles) -> tuple[Tensor, Tensor]:
    """Where each token of the packed sequence comes from, int64 [B, S], and which are kept, bool [B, S]."""
    drop = roles.queries.of(Role.PICTURE, Role.PAD, Role.UNUSED)
    order = (~drop).to(torch.int8).argsort(dim=1, stable=True)
    return order, ~drop.gather(1, order)


def _packed(decoder: Any, given: Mapping[str, Any], order: Tensor, keep: Tensor) -> dict[str, Any]:
    batch = order.shape[0]
    length = next(given[n].shape[1] for n in ("inputs_embeds", "input_ids") if n in given)
    out: dict[str, Any] = {"use_cache": False}
    for name, value in given.items():
        if name in _TAKEN or name in _OF_PICTURES or not isinstance(value, Tensor):
            continue
        if value.shape[:2] == (batch, length):
            at = order.reshape(*order.shape, *[1] * (value.dim() - 2)).expand(*order.shape, *value.shape[2:])
            out[name] = value.gather(1, at)
    out["position_ids"] = (keep.cumsum(1) - 1).clamp(min=0)
    out["attention_mask"] = _mask(decoder, given.get("attention_mask"), order, keep, length)
    return out


def _mask(decoder: Any, mask: Any, order: Tensor, keep: Tensor, length: int) -> Any:
    """The mask of the packed tokens: one of two dimensions, unless the caller made whole ones, which may see ahead."""
    whole = mask.get("full_attention") if isinstance(mask, Mapping) else mask
    if not isinstance(whole, Tensor) or whole.dim() != 4:
        return keep.long()
    full = _gathered(_square(whole, order.shape[0], length), order, keep)
    if not isinstance(mask, Mapping):
        return full
    if unknown := sorted(set(mask) - {"full_attention", "sliding_attention"}):
        raise NotImplementedError(f"masks of {unknown} cannot be made for a prompt without its pictures")
    out = {"full_attention": full}
    if "sliding_attention" in mask:
        place = torch.arange(order.shape[1], device=order.device)
        far = place[:, None] - place >= decoder.config.sliding_window
        out["sliding_attention"] = full.masked_fill(far, _hidden(full))
    return out


def _square(mask: Tensor, batch: int, length: int) -> Tensor:
    """A mask for the tokens of the pass alone, without empty places of a static cache."""
    return mask[..., :length].expand(batch, -1, -1, -1)


def _gathered(mask: Tensor, order: Tensor, keep: Tensor) -> Tensor:
    heads, count = mask.shape[1], order.shape[1]
    rows = mask.gather(2, order[:, None, :, None].expand(-1, heads, -1, mask.shape[3]))
    out = rows.gather(3, order[:, None, None, :].expand(-1, heads, count, -1))
    out = out.masked_fill(~keep[:, None, None], _hidden(out))
    own = torch.eye(count, dtype=torch.bool, device=order.device) & ~keep[:, None, :, None]
    return out.masked_fill(own, True if out.dtype == torch.bool else 0.0)  # what is dropped sees itself, not nothing


def _hidden(mask: Tensor) -> Any:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min

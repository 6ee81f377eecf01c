"""How much each generated token depends on the picture."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from eff_kernels.edit.attention import (
    AttentionCall,
    AttentionOutput,
    Role,
    TokenRoles,
    decoder_attention,
    find_decoder,
    observe_attention,
    tokens_of,
)
from torch import Tensor

from eff_attention.head_reinforcement.functional import token_vhd, vision_aware_divergence
from eff_attention.head_reinforcement.without_pictures import arguments, without_pictures

_BARE = "eff_trace_without_pictures"


@torch.no_grad()
def head_outputs(
    model: Any, inputs: Mapping[str, Any], layers: Sequence[int] | None = None, position: int = -1
) -> dict[int, Tensor]:
    """Outputs of heads before the output projection at one place of each sequence, by layer [B, H, d].

    Args:
        model: A decoder of transformers, with pictures or without.
        inputs: Its arguments.
        layers: Which layers; None for all.
        position: Place in the sequence; negative ones count from the end.

    Raises:
        ValueError: a layer does not exist.
    """
    found: dict[int, Tensor] = {}

    def record(call: AttentionCall, output: AttentionOutput) -> None:
        found[call.layer or 0] = output.out[:, :, position]

    with observe_attention(model, record, where=_names(model, layers), own_thread=True):
        model(**inputs)
    return found


@torch.no_grad()
def trace_tvhd(
    model: Any,
    inputs: Mapping[str, Any],
    generated_ids: Tensor,
    k: int | None = None,
    *,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """T-VHD of each generated token, from one pass over prompt and answer with the pictures and one without.

    Args:
        model: A picture-language model.
        inputs: What its processor gives for the prompts, with input_ids [B, T].
        generated_ids: The answers, int64 [B, N].
        k: See `token_vhd`.
        layers: Which layers; None for all.

    Returns:
        float32 [B, N]; low where a token would have been said without the picture too.

    Raises:
        ValueError: no prompt has a picture, a layer does not exist, or k is out of range.
        NotImplementedError: text sees text behind it (PaliGemma), so that one pass cannot tell what each step saw.
    """
    count = generated_ids.shape[1]
    sides: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}
    mine = threading.get_ident()

    def record(call: AttentionCall, output: AttentionOutput) -> None:
        sides[_BARE in call.extra][call.layer or 0] = output.out[:, :, -count:]

    def before(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        roles = tokens_of(kwargs)
        if _BARE in kwargs or roles is None or threading.get_ident() != mine:
            return
        if not bool(roles.queries.of(Role.PICTURE).any()):
            raise ValueError("no prompt has a picture")
        given = arguments(decoder, args, kwargs)
        _refuse_looking_ahead(given.get("attention_mask"), roles)
        decoder(**without_pictures(decoder, given, roles), **{_BARE: True})

    with observe_attention(model, record, where=_names(model, layers), needs=["roles"], own_thread=True):
        hook = find_decoder(model).register_forward_pre_hook(before, with_kwargs=True)
        try:
            model(**_continued(inputs, generated_ids[:, :-1]), use_cache=False)
        finally:
            hook.remove()
    vhd = [
        vision_aware_divergence(here.transpose(1, 2), sides[True][layer].transpose(1, 2))
        for layer, here in sorted(sides[False].items())
    ]
    return token_vhd(vhd, k)


def _refuse_looking_ahead(mask: Any, roles: TokenRoles) -> None:
    whole = mask.get("full_attention") if isinstance(mask, Mapping) else mask
    if not isinstance(whole, Tensor) or whole.dim() != 4:
        return
    seen = whole if whole.dtype == torch.bool else whole > torch.finfo(whole.dtype).min / 2
    text, count = ~roles.queries.of(Role.PICTURE, Role.PAD), whole.shape[2]
    ahead = torch.ones(count, count, dtype=torch.bool, device=whole.device).triu(1)
    if bool((seen[:, 0, :, :count] & ahead & text[:, :, None] & text[:, None]).any()):
        raise NotImplementedError("the prompt sees itself whole; what each step saw of an answer cannot be traced")


def _continued(inputs: Mapping[str, Any], more: Tensor) -> dict[str, Any]:
    """Inputs of prompts with tokens of answers behind them."""
    out = dict(inputs)
    out["input_ids"] = torch.cat([inputs["input_ids"], more.to(inputs["input_ids"].device)], 1)
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if inputs.get(name) is not None:
            out[name] = torch.nn.functional.pad(inputs[name], (0, more.shape[1]), value=fill)
    return out


def _names(model: Any, layers: Sequence[int] | None) -> list[str]:
    names = decoder_attention(model)
    if layers is None:
        return names
    if wrong := [i for i in layers if not 0 <= i < len(names)]:
        raise ValueError(f"layers {wrong} do not exist; the model has 0..{len(names) - 1}")
    return [names[i] for i in layers]

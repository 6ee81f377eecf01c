"""Follow what the tokens of a decoder are, from the ids that its model is called with, through caches and generation.

A hook on the decoder adds a `Step` to the arguments, which the layers hand down to their attention: gradient
checkpointing repeats it, and two threads have two. What is known of tokens in a cache is kept with that cache.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eff_kernels.edit.attention import pictures
from eff_kernels.edit.attention.tokens import Role, TokenRoles, Tokens
from eff_kernels.edit.attention.transformers import ROLES
from eff_kernels.edit.caches import given_cache, returned_cache
from eff_kernels.edit.handle import Handle

_HISTORY = "_eff_tokens"
_GRIDS = ("image_grid_thw", "video_grid_thw", "image_sizes")


@dataclass(frozen=True)
class _Seen:
    """Arguments of the model around a decoder, which gets embeddings of them only."""

    config: Any
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class _Prompt:
    """The prompt of a running ``generate``.

    Its passes may leave out sizes of pictures that it was called with, or give them for each beam.

    Attributes:
        length: Tokens.
        mask: Its attention mask.
        rows: Sequences, before they become several beams each.
        grids: Sizes of the pictures.
    """

    length: int
    mask: Tensor | None
    rows: int
    grids: Mapping[str, Any]


@dataclass(frozen=True)
class History:
    """What is known of the tokens so far: kept with the cache that holds their keys."""

    ids: Tensor
    tokens: Tokens
    grids: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Tokens of one forward of a decoder, those in the cache included.

    Attributes:
        history: All tokens up to the last of this forward.
        position: Place of the first token of this forward.
        offsets: For each layer the place of the first key that it gets.
        prompt_length: See `TokenRoles`.
        known: Roles that layers of this forward got; most of them have the same keys.
    """

    history: History
    position: int
    offsets: tuple[int, ...]
    prompt_length: int | None = None
    known: dict[tuple[int, int], TokenRoles] = field(default_factory=dict, compare=False, repr=False)

    def roles(self, layer: int | None, q: Tensor, k: Tensor) -> TokenRoles | None:
        """The roles of a layer's queries and keys, or None if its queries are not the tokens of this forward."""
        tokens, queries, keys = self.history.tokens, q.shape[2], k.shape[2]
        if tokens.role.shape != (q.shape[0], self.position + queries):
            return None
        offset = self.offsets[layer] if layer is not None and layer < len(self.offsets) else 0
        found = self.known.get((offset, keys))
        if found is None:
            own, seen = tokens.slice(self.position, queries), tokens.slice(offset, keys)
            found = TokenRoles(own, seen, self.position, offset, self.prompt_length)
            self.known[offset, keys] = found
        return found


_seen: contextvars.ContextVar[tuple[_Seen, ...]] = contextvars.ContextVar("eff_model_arguments", default=())
_prompt: contextvars.ContextVar[_Prompt | None] = contextvars.ContextVar("eff_prompt", default=None)


def follow(model: nn.Module, names: list[str], handle: Handle) -> None:
    """Have the attention modules of these names know their tokens until the handle is removed.

    Raises:
        ValueError: none of them is in a decoder of transformers.
    """
    modules = dict(model.named_modules())
    decoders = {d: None for n in names if (d := decoder_of(modules, n)) is not None}
    if not decoders:
        raise ValueError("roles of tokens are known only in decoders of transformers, and none of them was intercepted")
    for name in decoders:
        decoder = modules[name]
        handle.on_remove(decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True).remove)
        handle.on_remove(decoder.register_forward_hook(_after_decoder, with_kwargs=True).remove)
        owner = next((modules[p] for p in _ancestors(name) if pictures.token_ids(_config(modules[p]))), None)
        if owner is not None:
            handle.on_remove(owner.register_forward_pre_hook(_before_owner, with_kwargs=True).remove)
            handle.on_remove(owner.register_forward_hook(_after_owner, always_call=True).remove)
    for module in modules.values():
        if callable(getattr(module, "generate", None)) and "config" in module.__dict__:
            _watch(module, handle)


def decoder_of(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """The decoder that a module belongs to: the innermost module around it that takes embeddings and a cache.

    A vision tower sits in such a module too, but that one has the decoder in it as well.
    """
    above = next((a for a in _ancestors(name) if _decodes(modules[a])), None)
    if above is None or any(_decodes(m) for m in modules[above].modules() if m is not modules[above]):
        return None
    return above


def find_decoder(model: nn.Module) -> nn.Module:
    """The language decoder of a model: the innermost module that takes embeddings and a cache.

    Raises:
        NotImplementedError: there is none, or several.
    """
    found = [m for m in model.modules() if _decodes(m) and not any(_decodes(c) for c in m.modules() if c is not m)]
    if len(found) != 1:
        raise NotImplementedError(
            f"{type(model).__name__} has {len(found)} language decoders of transformers, wanted 1"
        )
    return found[0]


def tokens_of(arguments: Mapping[str, Any]) -> TokenRoles | None:
    """What the tokens of one forward of a decoder are, for hooks on the decoder and its layers.

    Args:
        arguments: Keyword arguments that the hook gets.

    Returns:
        Roles of this forward's tokens as queries and of all tokens up to the last as keys; None where no rule on the
        decoder's attention has asked for roles.
    """
    step: Step | None = arguments.get(ROLES)
    if step is None:
        return None
    tokens = step.history.tokens
    count = tokens.role.shape[1] - step.position
    return TokenRoles(tokens.slice(step.position, count), tokens, step.position, 0, step.prompt_length)


def _decodes(module: nn.Module) -> bool:
    return _takes(type(module))  # type: ignore[arg-type]


@functools.cache
def _takes(kind: Any) -> bool:
    forward = inspect.signature(inspect.unwrap(kind.forward))
    names = forward.parameters.keys()
    return "inputs_embeds" in names and not names.isdisjoint(("past_key_values", "cache"))


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, -1, -1)]


def _config(module: Any) -> Any:
    return getattr(module, "config", None)


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(_parameters(type(module).forward), args, strict=False)), **kwargs}


@functools.lru_cache(maxsize=256)
def _parameters(forward: Callable[..., Any]) -> list[str]:
    """Names of what a forward takes behind its module."""
    return list(inspect.signature(inspect.unwrap(forward)).parameters)[1:]


def _before_owner(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _seen.set((*_seen.get(), _Seen(_config(module), _bound(module, args, kwargs))))


def _after_owner(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    _seen.set(_seen.get()[:-1])


def _before_decoder(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if ROLES in kwargs:
        return None
    own = _bound(module, args, kwargs)
    outer = _seen.get()[-1] if own.get("input_ids") is None and _seen.get() else _Seen(_config(module), own)
    like = own.get("inputs_embeds") if own.get("input_ids") is None else own["input_ids"]
    if like is None:
        return None
    ids = outer.arguments.get("input_ids")
    masks: tuple[Any, ...] = (outer.arguments.get("attention_mask"), own.get("attention_mask"))
    if ids is None or ids.shape != like.shape[:2]:
        masks = masks if ids is None else masks[1:]  # of other tokens than those around the decoder
        ids = torch.full(like.shape[:2], -1, device=like.device)
    cache = given_cache(own)
    step = _step(ids, cache, outer, masks)
    if cache is not None:
        setattr(cache, _HISTORY, step.history)
    return args, {**kwargs, ROLES: step}


def _after_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """A cache that the decoder made itself gets to know its tokens as well."""
    step, cache = kwargs.get(ROLES), returned_cache(output)
    if step is not None and cache is not None:
        setattr(cache, _HISTORY, step.history)


def _step(ids: Tensor, cache: Any, outer: _Seen, masks: tuple[Any, ...]) -> Step:
    past = 0 if cache is None else int(cache.get_seq_length())
    count = ids.shape[1]
    layers = 0 if cache is None else len(getattr(cache, "layers", ()))
    offsets = tuple(int(cache.get_mask_sizes(count, layer)[1]) for layer in range(layers))
    old = _recalled(getattr(cache, _HISTORY, None), ids, past)
    prompt = _prompt.get()
    generated = past + count if prompt is None else max(past, prompt.length)
    if prompt is None and past and count == 1:
        generated = past
    history = _grown(old, ids, outer, generated, prompt)
    pads = _pads(masks, prompt, past + count)
    if pads is not None and pads.shape[0] == ids.shape[0]:
        role = history.tokens.role.masked_fill(pads.to(ids.device), int(Role.PAD))
        history = History(history.ids, history.tokens.with_role(role), history.grids)
    return Step(history, past, offsets, None if prompt is None else prompt.length)


def _recalled(old: History | None, ids: Tensor, past: int) -> History:
    """What is known of ``past`` tokens in a cache, cut or filled up with unknown ones."""
    batch = ids.shape[0]
    if old is None or batch % old.ids.shape[0]:
        old = History(ids[:, :0], Tokens.of_role(Role.UNKNOWN, ids[:, :0]))
    times = batch // old.ids.shape[0]
    known = old.ids.to(ids.device).repeat_interleave(times, 0)[:, :past]
    tokens = old.tokens.repeat(times).slice(0, known.shape[1])
    missing = known.new_full((batch, past - known.shape[1]), -1)
    return History(torch.cat([known, missing], 1), tokens.append(Tokens.of_role(Role.UNKNOWN, missing)), old.grids)


def _grown(old: History, ids: Tensor, outer: _Seen, generated: int, prompt: _Prompt | None) -> History:
    """The history with the tokens of this forward; those from place ``generated`` on are the model's own."""
    past = old.ids.shape[1]
    every = torch.cat([old.ids, ids], 1)
    if generated <= past:  # nothing of the prompt: what is known stays
        return History(every, old.tokens.append(Tokens.of_role(Role.GENERATED, ids)), old.grids)
    given = {n: torch.as_tensor(x) for n in _GRIDS if (x := outer.arguments.get(n)) is not None}
    if prompt is not None and prompt.grids.keys() - given.keys() and every.shape[0] % prompt.rows == 0:
        grids, beams = prompt.grids, every.shape[0] // prompt.rows
    else:
        joined = {n: _joined(n, old.grids.get(n), x, every, outer.config) for n, x in given.items()}
        grids, beams = {**old.grids, **joined}, 1
    tokens = Tokens.of_prompt(every[::beams], outer.config, grids).repeat(beams)
    spoken = torch.arange(every.shape[1], device=ids.device) >= generated
    spoken = spoken | torch.cat([old.tokens.of(Role.GENERATED), torch.zeros_like(ids, dtype=torch.bool)], 1)
    return History(every, tokens.spoken_at(spoken), grids)


def _joined(name: str, old: Tensor | None, new: Tensor, ids: Tensor, config: Any) -> Tensor:
    """Sizes of all pictures so far: a forward gives those of all, or of the pictures that it brings itself."""
    if old is None or pictures.tokens_told(name, new, config) >= pictures.tokens_shown(name, ids, config):
        return new
    return torch.cat([old.to(new.device), new])


def _pads(masks: tuple[Any, ...], prompt: _Prompt | None, length: int) -> Tensor | None:
    """Which tokens are padding, bool [B, length], as far as a mask tells."""
    for mask in masks:
        full = mask.get("full_attention") if isinstance(mask, dict) else mask
        if not isinstance(full, Tensor):
            continue
        if full.dim() == 4:  # its last query sees every token that is none
            full = full[:, 0, -1] if full.dtype == torch.bool else full[:, 0, -1] > torch.finfo(full.dtype).min / 2
        if full.shape[1] >= length:
            return ~full[:, :length].bool()
    if prompt is None or prompt.mask is None or prompt.mask.dim() != 2:
        return None
    known = prompt.mask[:, :length].bool()
    return ~torch.nn.functional.pad(known, (0, length - known.shape[1]), value=True)


def _watch(module: Any, handle: Handle) -> None:
    """Have a module's ``generate`` tell how long its prompt is."""
    watch = module.__dict__.get("generate")
    if not isinstance(watch, _Generate):
        watch = _Generate(module, watch)
        module.generate = watch
    watch.users += 1
    handle.on_remove(functools.partial(_unwatch, module, watch))


def _unwatch(module: Any, watch: _Generate) -> None:
    watch.users -= 1
    if not watch.users and module.__dict__.get("generate") is watch:
        del module.generate
        if watch.own is not None:
            module.generate = watch.own


class _Generate:
    """``generate`` of a module that lets its forwards know where the prompt ends."""

    def __init__(self, module: nn.Module, own: Callable[..., Any] | None) -> None:
        self.module, self.own, self.users = module, own, 0
        self.kind: Any = type(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate."""
        generate = self.own if self.own is not None else functools.partial(self.kind.generate, self.module)
        given = [args[0] if args else None, *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((x for x in given if isinstance(x, Tensor)), None)
        if prompt is None:
            return generate(*args, **kwargs)
        grids = {n: torch.as_tensor(x) for n in _GRIDS if (x := kwargs.get(n)) is not None}
        token = _prompt.set(_Prompt(prompt.shape[1], kwargs.get("attention_mask"), prompt.shape[0], grids))
        try:
            return generate(*args, **kwargs)
        finally:
            _prompt.reset(token)

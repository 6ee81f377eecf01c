"""One forward pass of a decoder: an object that its attention gets, and states that stay with the cache.

Rules hold settings alone. What belongs to one pass goes down among the arguments of the decoder, and what later passes
need is kept on the cache: two threads, two prompts and two copies never meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels import Handle
from eff_kernels.edit.attention import AttentionCall, Role, TokenRoles, decoder_attention, tokens_of
from eff_kernels.edit.caches import given_cache, returned_cache
from torch import Tensor, nn


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        states: What is kept with the cache, by layer; states are immutable and replaced.
        roles: The tokens of the pass, None where they are not known.
        prompt: Whether some of its tokens are of the prompt.
        notes: What hooks found in this pass, by layer.
    """

    states: dict[int, Any]
    roles: TokenRoles | None = None
    prompt: bool = True
    notes: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Keeper:
    """The hooks of one method on a decoder.

    Attributes:
        name: Of the method and of its place among others.
    """

    name: str

    @classmethod
    def named(cls, method: str, order: float | None, **more: Any) -> Any:
        """One whose states are apart from those of the same method with another order."""
        return cls(method if order is None else f"{method}@{float(order)}", **more)

    @property
    def argument(self) -> str:
        """Name among the arguments."""
        return f"eff_{self.name}"

    def attach(self, decoder: nn.Module, handle: Handle) -> None:
        """Put the hooks in until the handle is removed; after those that follow the roles of tokens."""
        handle.on_remove(decoder.register_forward_pre_hook(self.before, with_kwargs=True).remove)
        handle.on_remove(decoder.register_forward_hook(self.after, with_kwargs=True).remove)

    def before(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hand an object down, unless an outer caller has done so."""
        if self.argument in kwargs:
            return None
        cache = given_cache(kwargs)
        states = {} if cache is None else self.kept(cache)
        if cache is not None:
            cache.__dict__[f"_{self.argument}"] = states
        roles = tokens_of(kwargs)
        prompt = roles is None or bool((roles.queries.role != int(Role.GENERATED)).any())
        now = self.begin(decoder, args, kwargs, Pass(states, roles, prompt))
        return args, {**kwargs, self.argument: now}

    def begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], now: Pass) -> Pass:
        """What a method does when a pass begins."""
        return now

    def after(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A cache that the decoder made itself gets the states as well."""
        cache, now = returned_cache(output), kwargs.get(self.argument)
        if cache is not None and isinstance(now, Pass):
            cache.__dict__.setdefault(f"_{self.argument}", now.states)

    def kept(self, cache: Any) -> dict[int, Any]:
        """The states with a cache."""
        states: dict[int, Any] = getattr(cache, f"_{self.argument}", {})
        return states

    def of(self, call: AttentionCall) -> Pass:
        """The pass that a call belongs to.

        Raises:
            NotImplementedError: the attention does not get the arguments of its decoder.
        """
        now = call.extra.get(self.argument)
        if not isinstance(now, Pass):
            raise NotImplementedError(f"{call.name} does not get the arguments of its decoder, which {self.name} needs")
        return now


def states_in(cache: Any, method: str, order: float | None = None) -> dict[int, Any]:
    """The states of a method with a cache, by layer."""
    keeper: Keeper = Keeper.named(method, order)
    return dict(sorted(keeper.kept(cache).items()))


@dataclass(frozen=True)
class Marks:
    """A few bits of each key, by which rows of a cache are found again that were reordered, repeated or dropped.

    Attributes:
        bits: The first eight bytes of each key of the first head, int64 [B, n].
        start: Place of the first of them.
    """

    bits: Tensor
    start: int

    @classmethod
    def of(cls, call: AttentionCall, offset: int, stop: int) -> Marks:
        """Of the keys of a call up to place ``stop``; its first key has place ``offset``."""
        return cls(key_bits(call.k[:, :, : max(0, stop - offset)]), offset)

    def rows(self, call: AttentionCall, offset: int) -> Tensor | None:
        """For each row that the cache now has, the row that it was, int64 [B]; None where all are as they were.

        Raises:
            RuntimeError: a row is none of those that were there.
        """
        key, count = call.k, self.bits.shape[1]
        first, stop = max(offset, self.start), min(offset + key.shape[2], self.start + count)
        if key.shape[0] == self.bits.shape[0] and (key.shape[0] == 1 or stop <= first):
            return None
        now = key_bits(key[:, :, first - offset : max(first, stop) - offset])
        old = self.bits[:, first - self.start : max(first, stop) - self.start].to(now.device)
        if now.shape == old.shape and torch.equal(now, old):
            return None
        same = (now[:, None] == old).all(-1)
        if not now.shape[1] or not bool(same.any(1).all()):
            raise RuntimeError(
                f"{call.name}: the cache holds other rows ({key.shape[0]}) than those that its prompt was read with "
                f"({self.bits.shape[0]}); begin with an empty cache"
            )
        return same.int().argmax(1)


def key_bits(key: Tensor) -> Tensor:
    """The first eight bytes of each key of the first head of [B, KV, n, D], int64 [B, n]."""
    width = 8 // key.element_size()
    return key.detach()[:, 0, :, :width].contiguous().view(torch.int64)[..., 0]


def spread(mask: Tensor, offset: int, count: int) -> Tensor:
    """A mask [B, n] of places 0..n-1 for the ``count`` keys from place ``offset`` on, bool [B, count]."""
    part = mask[:, offset : offset + count]
    return torch.nn.functional.pad(part, (0, count - part.shape[1]))


def checked_roles(call: AttentionCall) -> TokenRoles:
    """The roles of a call.

    Raises:
        NotImplementedError: they are not known.
    """
    if call.roles is None:
        raise NotImplementedError(f"{call.name} does not know its tokens, so that pictures cannot be found")
    return call.roles


def decoder_layers(model: Any) -> list[tuple[str, nn.Module]]:
    """Attention modules of a picture-language model's decoder by name, one a layer, each with the layer around it.

    Raises:
        NotImplementedError: the attention of some layers cannot be reached.
    """
    modules = dict(model.named_modules())
    names = decoder_attention(model)
    count = text_config(model).num_hidden_layers
    if len(names) != count:
        raise NotImplementedError(
            f"of {type(model).__name__} the attention of {len(names)} of {count} layers can be reached; wanted all "
            "on transformers' AttentionInterface"
        )
    return [(name, modules[name.rpartition(".")[0]]) for name in names]


def text_config(model: Any) -> Any:
    """The config of a model's decoder.

    Raises:
        NotImplementedError: the model has none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(f"wanted a decoder of transformers, got {type(model).__name__}")
    return config.get_text_config()

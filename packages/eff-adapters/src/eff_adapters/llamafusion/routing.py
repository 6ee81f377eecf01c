"""Which token goes through which weights: gathered execution of two modules at the cost of one."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

ARGUMENT = "modality_routing"
"""Argument of decoder layers: the `Routing` of the call; absent or None: all tokens are text."""

_OF_ADAPTERS = frozenset({"base_layer", "unload_and_optionally_merge_module"})
"""By these PEFT knows its layers: it would put the text's layer in the place of both."""

current: contextvars.ContextVar[Routing | None] = contextvars.ContextVar("eff_modality_routing", default=None)


@dataclass(frozen=True, slots=True)
class Routing:
    """Places of text and of picture tokens among the [batch * tokens] of a call.

    Attributes:
        text: int64 [number of text tokens].
        pictures: int64 [number of picture tokens].
        inverse: int64 [batch * tokens]: where each token lies when all text tokens come first, then all others.
        run: First picture token and the one behind the last, if they are neighbours: they need no copy then.
    """

    text: Tensor
    pictures: Tensor
    inverse: Tensor
    run: tuple[int, int] | None

    @classmethod
    def of(cls, modality_ids: Tensor) -> Self | None:
        """The routing of modality ids [batch, tokens], 0 text and 1 picture; None if all are text."""
        flat = modality_ids.flatten().bool()
        pictures = flat.nonzero().flatten()
        if not len(pictures):
            return None
        text = (~flat).nonzero().flatten()
        first, last = int(pictures[0]), int(pictures[-1])
        run = (first, last + 1) if last + 1 - first == len(pictures) else None
        return cls(text, pictures, torch.cat([text, pictures]).argsort(), run)


class ModalityModule(nn.Module):
    """Two modules of one kind; each token goes through that of its modality, and through no other.

    What it wraps (a norm, a projection, a whole feed forward) maps each token by itself. Without picture tokens in the
    call it runs the text module on the very tensor that came in.

    Attributes:
        text: The model's own module.
        picture: Its counterpart for picture tokens.
    """

    def __init__(self, text: nn.Module, picture: nn.Module) -> None:
        super().__init__()
        self.text, self.picture = text, picture

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OF_ADAPTERS:
                raise
            return getattr(super().__getattr__("text"), name)  # such as weight, in_features: hosts ask for them

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, tokens, ...]."""
        routing = current.get()
        if routing is None:
            return self.text(x)
        if not len(routing.text):
            return self.picture(x)
        flat = x.flatten(0, 1)
        if len(flat) != len(routing.inverse):
            raise ValueError(f"a module got {len(flat)} tokens, the modality ids are of {len(routing.inverse)}")
        # One row of tokens: some feed forwards, such as mixtures of experts, take three dimensions alone.
        text = self.text(flat.index_select(0, routing.text)[None])[0]
        if routing.run is not None:
            first, end = routing.run
            picture = self.picture(flat[None, first:end])[0].to(text.dtype)
            return torch.cat([text[:first], picture, text[first:]]).unflatten(0, x.shape[:2])
        picture = self.picture(flat.index_select(0, routing.pictures)[None])[0]
        joined = torch.cat([text, picture.to(text.dtype)]).index_select(0, routing.inverse)
        return joined.unflatten(0, x.shape[:2])


class LowRankLinear(nn.Module):
    """A linear layer of text, shared, plus an addition of low rank that is the pictures' own; zero at first.

    Attributes:
        lora_a: [rank, in_features].
        lora_b: [out_features, rank].
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self._base = (base,)  # in a tuple: the layer belongs to the text side, not to this module
        dtype = base.weight.dtype if base.weight.is_floating_point() else torch.get_default_dtype()
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, dtype=dtype, device=base.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features]."""
        linear = torch.nn.functional.linear
        return self._base[0](x) + linear(linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b)

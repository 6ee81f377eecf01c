"""The rule that damages heads of a model, and whether it does so now, in this thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from eff_kernels import Handle
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, intercept_attention
from torch import Tensor, nn

from eff_guidance.denoiser import check_whole
from eff_guidance.head_guidance.config import SoftPAGConfig, check_strength
from eff_guidance.head_guidance.heads import Head, list_heads, locate, plain_name
from eff_guidance.head_guidance.softpag import perturb
from eff_guidance.together import current_layout, in_parts


class Plan(NamedTuple):
    """What happens in one module: its heads by number, their places in the config, and their strengths [h]."""

    heads: tuple[int, ...]
    places: tuple[int, ...]
    strength: Tensor


class _Now(threading.local):
    """What one thread is doing: ``first`` is the first damaged sample of the batch of this pass, None for none."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.armed = False


class Damage:
    """A rule for `intercept_attention`. Compiled code has one graph with damage and one without.

    Strengths are tensors of their own, so that another strength needs no other graph.

    Args:
        heads: The heads.
        plans: What happens where, by plain name of module.
        target: Of `soft_perturb_attention`.
        path: Of `soft_perturb_attention`.
        always: Whether each pass is damaged; else those inside `active`.
    """

    def __init__(
        self, heads: tuple[Head, ...], plans: Mapping[str, Plan], target: str, path: str, always: bool
    ) -> None:
        self.heads, self.plans, self.target, self.path, self.always = heads, dict(plans), target, path, always
        self.rowwise = target == "identity" and path == "linear"  # needs a row's output and value, and no map
        self.strengths = (0.0,) * len(heads)
        self.now = _Now()

    def set_strength(self, strength: float | tuple[float, ...]) -> None:
        """Set u of all heads, or of each.

        Raises:
            ValueError: outside of 0..1, or another number of them than heads.
        """
        many = check_strength(strength, len(self.heads))
        self.strengths = many if isinstance(strength, tuple) else many * len(self.heads)
        for plan in self.plans.values():
            plan.strength.copy_(torch.tensor([self.strengths[p] for p in plan.places], dtype=torch.float64))

    @contextmanager
    def active(self, first: int = 0) -> Iterator[None]:
        """Damage what this thread runs inside, from sample ``first`` of the batch on."""
        before, self.now.first = self.now.first, first
        try:
            yield
        finally:
            self.now.first = before

    def __call__(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """Answer a call."""
        first = 0 if self.always else self.now.first
        if first is None:
            return attend(call)
        check_whole(call.module)
        # An image adapter attends from the same module to keys of its own: that map has no diagonal.
        if call.num_queries != call.num_keys:
            if in_parts():
                raise ValueError(
                    f"{call.name}: a layout asks for attention in parts, whose maps have no diagonal; give the "
                    "heads an order below the layout's"
                )
            return attend(call)
        if not self.rowwise and current_layout() != "none":
            raise ValueError(
                f"target={self.target!r}, path={self.path!r}: with a layout each row sees keys of its own, so that "
                "heads can only keep their own values; use target='identity' and path='linear'"
            )
        plan = self.plans.get(plain_name(call.name))
        if plan is None:
            raise RuntimeError(f"{call.name} was first taken by a rule under another name than {sorted(self.plans)}")
        return perturb(call, attend, plan.heads, plan.strength, self.target, self.path, first)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "now"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, now=_Now())


def install(model: nn.Module, config: SoftPAGConfig, *, always: bool, order: float | None) -> tuple[Damage, Handle]:
    """Put the rule for a config into a model.

    Raises:
        TypeError: the model's heads cannot be named.
        ValueError: a head does not exist, or another rule without order is there.
    """
    heads = tuple(list_heads(model)) if config.named is None else config.named
    plans: dict[str, Plan] = {}
    where = locate(model, heads)
    for name, places in where.items():
        numbers = tuple(heads[p].head for p in places)
        plans[plain_name(name)] = Plan(numbers, tuple(places), torch.zeros(len(places), dtype=torch.float64))
    damage = Damage(heads, plans, config.target, config.path, always)
    damage.set_strength(config.strength)
    if not where:
        return damage, Handle()
    return damage, intercept_attention(
        model, damage, where=lambda name, module: name in where, order=order, strict=True
    )

"""What the decoder does: hand chosen tokens down, and raise the attention to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, Part, Role, TokenRoles, masses
from torch import Tensor

from eff_attention.grounded_attention.config import PAIConfig, PAINTConfig
from eff_attention.grounded_attention.functional import boost_attention_logits
from eff_attention.grounded_attention.state import PictureState
from eff_attention.grounded_attention.tower import take_encoded
from eff_attention.passes import Keeper, Marks, Pass, checked_roles, spread
from eff_attention.plain import answer_of_one, is_one, scores_of_one


@dataclass(frozen=True)
class PAINTKeeper(Keeper):
    """The hooks on a decoder.

    Attributes:
        config: Settings.
    """

    config: PAIConfig = field(default_factory=PAIConfig)

    def begin(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], now: Pass) -> Pass:
        """Note which tokens of the pass are chosen, [2, B, Sq] under "chosen"."""
        if now.roles is None or not now.prompt:
            return now
        picture = now.roles.queries.of(Role.PICTURE)
        chosen = torch.stack([picture, torch.zeros_like(picture)])
        if isinstance(self.config, PAINTConfig) and bool(picture.any()):
            found = take_encoded(picture.sum(1))
            if found is None:
                raise NotImplementedError(
                    f"{int(picture.sum())} picture tokens came without their pictures being encoded in this thread "
                    "before; pass pixel_values, each picture in one piece, or use PAIConfig"
                )
            chosen = torch.zeros_like(chosen)
            chosen[:, picture] = found.to(picture.device)
        now.notes["chosen"] = chosen
        return now


@dataclass(frozen=True)
class Plan:
    """What is raised in the calls of one pass.

    Attributes:
        asked: Queries, bool [B, Sq].
        first: The first of them; None where there is none.
        local: Keys that alpha is for, bool [B, Sk].
        summary: Keys that beta is for, bool [B, Sk].
        strength: How much a logit e of the first query is raised, in |e|, [B, 1, Sk], as wide as its scores.
        of: What it was made of.
    """

    asked: Tensor
    first: int | None
    local: Tensor
    summary: Tensor
    strength: Tensor
    of: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PAINTRule:
    """The rule, the same for all layers of the decoder.

    Attributes:
        keeper: Hands the pass down, keeps states, and has the settings.
        gains: Factor of each layer and head, if they are given.
    """

    keeper: PAINTKeeper
    gains: tuple[tuple[float, ...], ...] | None

    def __call__(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """Answer a call of a layer."""
        # Whether there are pictures decides what is computed.
        return uncompiled(self._answer)(call, attend)

    def _answer(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        config, roles = self.keeper.config, checked_roles(call)
        beta = config.beta if isinstance(config, PAINTConfig) else 0.0
        if config.alpha == 0.0 and beta == 0.0:
            return attend(call)
        state = self._state(call, roles)
        if state is None or not state.found:
            return attend(call)
        plan = self._plan(call, roles, state)
        if plan.first is None:
            return attend(call)
        gain = state.gain
        if self.gains is not None:
            gain = torch.tensor(self.gains[call.layer or 0], device=call.q.device)
        if is_one(call, attend):
            scores = scores_of_one(call)
            strength = plan.strength if gain is None else plan.strength * gain[..., None]
            return answer_of_one(call, scores.addcmul(strength, scores.abs()).softmax(-1))

        def edit(block: Tensor, part: Part) -> Tensor:
            own = None if gain is None else gain[..., part.heads]
            raised = boost_attention_logits(block, plan.local, plan.summary, config.alpha, beta, own)
            return torch.where(plan.asked[:, None, part.rows, None], raised, block)

        return attend.with_logits(call, edit, rows=slice(plan.first, call.num_queries))

    def _plan(self, call: AttentionCall, roles: TokenRoles, state: PictureState) -> Plan:
        """What is raised in a call; made once for all layers that know the same tokens."""
        config, notes = self.keeper.config, self.keeper.of(call).notes
        key = "plan", id(state.local), id(state.summary), roles.offset, call.num_queries, call.num_keys
        found: Plan | None = notes.get(key)
        if found is not None:
            return found
        asked = self._rows(call, roles) & _behind(state, roles, call.num_queries)
        first = next(iter(asked.any(0).nonzero()[:, 0].tolist()), None)
        local, summary = (spread(x, roles.offset, call.num_keys) for x in (state.local, state.summary))
        beta = config.beta if isinstance(config, PAINTConfig) else 0.0
        wide = torch.float64 if call.dtype == torch.float64 else torch.float32
        strength = (config.alpha * local.to(wide) + beta * summary.to(wide))[:, None] * asked[:, None, :1]
        # The tokens stay with the plan, so that no others get the ids that it is found by.
        found = notes[key] = Plan(asked, first, local, summary, strength, (state.local, state.summary))
        return found

    def _rows(self, call: AttentionCall, roles: TokenRoles) -> Tensor:
        """Which queries are raised, bool [B, Sq]."""
        real = ~roles.queries.of(Role.PAD, Role.UNUSED)
        if self.keeper.config.rows == "all_text":
            return real & ~roles.queries.of(Role.PICTURE)
        if roles.prompt_length is not None and roles.position + call.num_queries < roles.prompt_length:
            return torch.zeros_like(real)  # a piece of a prompt, without its last token
        place = torch.arange(real.shape[1], device=real.device)
        return real & (place == torch.where(real, place, -1).amax(1, keepdim=True))

    def _state(self, call: AttentionCall, roles: TokenRoles) -> PictureState | None:
        """The chosen tokens up to the last of this pass."""
        now, layer = self.keeper.of(call), call.layer or 0
        if call.recomputed and layer in now.states:
            return now.states[layer]
        old: PictureState | None = now.states.get(layer) if roles.position else None
        if old is not None:
            at = old.marks.rows(call, roles.offset)
            if at is not None:
                old = now.states[layer] = old.rows(at)
        new = now.notes.get("chosen")
        if new is None:
            return old
        local, summary, found = _tokens(now, old, new, roles.position)
        gain = self._gain(call, roles) if self.keeper.config.head_gain == "attention_mass" else None
        marks = Marks.of(call, roles.offset, roles.position + call.num_queries)
        state = PictureState(local, summary, found, gain, marks)
        now.states[layer] = state
        return state

    @torch.no_grad()
    def _gain(self, call: AttentionCall, roles: TokenRoles) -> Tensor:
        """Attention to pictures of each head at the last token over the mean of the layer, within 0.5 and 1.5."""
        real = ~roles.queries.of(Role.PAD, Role.UNUSED)
        place = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, place, -1).amax(1).clamp(min=0)
        first = int(last.min())
        image = roles.keys.of(Role.PICTURE)
        seen = masses(call.replace(edits=()), image[:, None], q_index=slice(first, None))[..., 0]
        mass = seen[torch.arange(len(last), device=last.device), :, last - first]
        mean = mass.mean(-1, keepdim=True)
        return torch.where(mean > 0, mass / mean.where(mean > 0, 1.0), 1.0).clamp(0.5, 1.5)


def _tokens(now: Pass, old: PictureState | None, new: Tensor, position: int) -> tuple[Tensor, Tensor, bool]:
    """Local and summary tokens up to the last of a pass, bool [B, n] each, and whether there is any.

    Layers that knew the same tokens get the same tensors.
    """
    before = (None, None) if old is None else (old.local, old.summary)
    key = "tokens", *map(id, before)
    found = now.notes.get(key)
    if found is None:
        none = new.new_zeros((new.shape[1], 0))
        local, summary = (
            torch.cat([spread(none if was is None else was, 0, position), more], 1)
            for was, more in zip(before, new, strict=True)
        )
        found = now.notes[key] = (local, summary, bool(local.any() | summary.any()), before)
    return found[0], found[1], found[2]


def _behind(state: PictureState, roles: TokenRoles, count: int) -> Tensor:
    """Which queries have a chosen token before them, bool [B, Sq]."""
    chosen = state.local | state.summary
    first = torch.where(chosen.any(1), chosen.to(torch.int8).argmax(1), torch.iinfo(torch.int64).max)
    return torch.arange(count, device=chosen.device) + roles.position > first[:, None]

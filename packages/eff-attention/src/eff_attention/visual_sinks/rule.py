"""What a treated layer does in a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from eff_kernels import Attended, can_shift, move_weights
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, Part, Role, TokenRoles
from torch import Tensor

from eff_attention.passes import Keeper, Marks, checked_roles, spread
from eff_attention.plain import alike, answer_of_one, is_one, is_plain, scores_of_one
from eff_attention.visual_sinks.columns import Columns, is_worth_it
from eff_attention.visual_sinks.config import VARConfig
from eff_attention.visual_sinks.functional import image_centric_heads, redistribute_attention, sink_mask
from eff_attention.visual_sinks.statistics import VARCounts

_NEVER = 2**62


@dataclass(frozen=True)
class SinkState:
    """The sinks of one layer among the tokens of the prompt. Immutable: each part of a prompt makes a new one.

    Attributes:
        sinks: bool [B, n].
        first: Place of the first sink in a picture, int64 [B]; a large number where there is none.
        any_visual: Whether a row has one.
        marks: Of the keys.
    """

    sinks: Tensor
    first: Tensor
    any_visual: bool
    marks: Marks


@dataclass(frozen=True)
class SinkWatch:
    """The hook before a layer: notes which hidden states are those of sinks.

    Attributes:
        keeper: Hands the pass down.
        layer: Number of the layer.
        dims: Dimensions of sinks.
        tau: See `VARConfig`.
    """

    keeper: Keeper
    layer: int
    dims: tuple[int, ...]
    tau: float

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the hidden states [B, Sq, D] of a pass that has tokens of the prompt."""
        now = kwargs.get(self.keeper.argument)
        if now is not None and now.prompt:
            hidden = args[0] if args else kwargs["hidden_states"]
            now.notes[self.layer] = sink_mask(hidden.detach(), self.dims, self.tau)


@dataclass(frozen=True)
class VARRule:
    """The rule, the same for all layers.

    Attributes:
        config: Settings.
        keeper: Hands the pass down and keeps states.
        counts: Where it notes what it did.
    """

    config: VARConfig
    keeper: Keeper
    counts: VARCounts

    def __call__(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """Answer a call of a layer."""
        # Whether there are sinks decides what is computed.
        return uncompiled(self._answer)(call, attend)

    def _answer(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        roles = checked_roles(call)
        state = self._state(call, roles)
        if self.config.p == 0.0 or state is None or not state.any_visual:
            return attend(call)
        sinks = spread(state.sinks, roles.offset, call.num_keys)
        image = roles.keys.of(Role.PICTURE)
        rows = self._rows(roles, state.first)
        if is_one(call, attend):
            weights = scores_of_one(call).softmax(-1)[:, :, None]
            return answer_of_one(call, self._moved(call, weights, rows, image, sinks)[:, :, 0])
        first = 0
        if call.num_queries > 1:
            found = rows.any(0).nonzero()[:, 0].tolist()
            if not found:
                return attend(call)
            first = found[0]
        query, key, value = (alike(call, x) for x in (call.q, call.k, call.v))
        base = attend.with_lse(call) if attend.alone and is_plain(call) and can_shift(query, key, value) else None
        if base is not None and base.lse is not None:
            config = self.config
            out, moved = move_weights(
                Attended(query, key, value, base.out, base.lse, call.scale),
                image & ~sinks, image & sinks, sinks & ~image, rows,
                share=config.p, rho=config.rho, least=config.min_image_mass, by_sinks=config.ratio != "non_sink",
            )  # fmt: skip
            self.counts.note_moved(call.layer or 0, int(rows.sum()) * call.num_heads, moved)
            return base.replace(out=out)
        if attend.alone and is_worth_it(call, image | sinks):
            base = attend(call) if base is None else base
            few = Columns.of(call, image | sinks, first)
            moved = self._moved(call, few.weights, rows[:, first:], image[:, few.at], sinks[:, few.at])
            return base.replace(out=few.changed(call, base.out, moved))

        def edit(block: Tensor, part: Part) -> Tensor:
            return self._moved(call, block, rows[:, part.rows], image, sinks)

        return attend.with_weights(call, edit, rows=slice(first, call.num_queries))

    def _moved(self, call: AttentionCall, block: Tensor, rows: Tensor, image: Tensor, sinks: Tensor) -> Tensor:
        """Weights [B, H, q, Sk] of some queries, changed in those of ``rows`` [B, q]."""
        select = self._select(call, block, rows, image, sinks)
        return redistribute_attention(block, image, sinks, select, self.config.p)

    def _select(self, call: AttentionCall, block: Tensor, rows: Tensor, image: Tensor, sinks: Tensor) -> Tensor:
        """The pairs of head and query that are changed, bool [B, H, q]."""
        config = self.config
        asked = rows[:, None].expand(block.shape[:3])
        select = asked & image_centric_heads(block, image, sinks, config.rho, config.min_image_mass, ratio=config.ratio)
        if not call.recomputed:
            mass = torch.where(sinks[:, None, None], block.detach(), 0.0).sum(-1)
            self.counts.note_rows(call.layer or 0, asked, select, torch.where(select, config.p * mass, 0.0))
        return select

    def _state(self, call: AttentionCall, roles: TokenRoles) -> SinkState | None:
        """The sinks of the prompt up to the last token of this pass."""
        now, layer = self.keeper.of(call), call.layer or 0
        old: SinkState | None = now.states.get(layer) if roles.position else None
        if old is not None:
            at = old.marks.rows(call, roles.offset)
            if at is not None:
                first = old.first[at]
                old = SinkState(
                    old.sinks[at], first, bool((first < _NEVER).any()), Marks(old.marks.bits[at], old.marks.start)
                )
                now.states[layer] = old
        found = now.notes.get(layer)
        if found is None:
            return old
        prompt = ~roles.queries.of(Role.GENERATED, Role.PAD, Role.UNUSED)
        if call.recomputed and layer in now.states:
            return now.states[layer]
        before = prompt.new_zeros((prompt.shape[0], 0)) if old is None else old.sinks
        sinks = torch.cat([spread(before, 0, roles.position), found & prompt], 1)
        visual = found & roles.queries.of(Role.PICTURE)
        place = torch.arange(call.num_queries, device=visual.device) + roles.position
        first = torch.where(visual, place, _NEVER).amin(1)
        if old is not None:
            first = torch.minimum(first, old.first)
        marks = Marks.of(call, roles.offset, roles.position + call.num_queries)
        state = SinkState(sinks, first, bool((first < _NEVER).any()), marks)
        now.states[layer] = state
        if not call.recomputed:
            self.counts.note_prompt(layer, visual, found & prompt & ~visual)
        return state

    def _rows(self, roles: TokenRoles, first: Tensor) -> Tensor:
        """Which queries are treated, bool [B, Sq]: those that a sink in a picture comes before."""
        left_out = [Role.PAD, Role.UNUSED, *([Role.PICTURE] if self.config.rows == "after_image" else [])]
        place = torch.arange(roles.queries.role.shape[1], device=first.device) + roles.position
        return ~roles.queries.of(*left_out) & (place > first[:, None])

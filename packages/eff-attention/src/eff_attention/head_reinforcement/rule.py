"""What a treated layer does in a pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from eff_kernels.edit import uncompiled
from eff_kernels.edit.attention import Attend, AttentionCall, AttentionOutput, TokenRoles
from torch import Tensor

from eff_attention.head_reinforcement.functional import reject_negative_heads, select_heads, vision_aware_divergence
from eff_attention.head_reinforcement.keeper import Measuring, VHRKeeper, last_tokens
from eff_attention.passes import Marks, checked_roles


@dataclass(frozen=True)
class HeadState:
    """The heads of one layer that were chosen for the prompts in a cache.

    Attributes:
        heads: bool [B, H].
        marks: Of the keys of the prompt.
    """

    heads: Tensor
    marks: Marks


@dataclass(frozen=True)
class VHRRule:
    """The rule, the same for all layers.

    Attributes:
        keeper: Hands the pass down, keeps states, and has the settings.
    """

    keeper: VHRKeeper

    def __call__(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        """Answer a call of a layer."""
        # Which heads there are decides what is computed.
        return uncompiled(self._answer)(call, attend)

    def _answer(self, call: AttentionCall, attend: Attend) -> AttentionOutput:
        output = attend(call)
        if self.keeper.config.alpha == 1.0:
            return output
        measuring = call.extra.get(self.keeper.argument)
        if isinstance(measuring, Measuring):
            return self._measured(call, output, measuring)
        heads = self._heads(call, output.out, checked_roles(call))
        return output if heads is None else self._scaled(output, heads)

    def _scaled(self, output: AttentionOutput, heads: Tensor) -> AttentionOutput:
        factor = torch.where(heads, self.keeper.config.alpha, 1.0).to(output.out)
        return output.replace(out=output.out * factor[:, :, None, None])

    def _measured(self, call: AttentionCall, output: AttentionOutput, measuring: Measuring) -> AttentionOutput:
        """A pass without pictures, or one of rows with and without."""
        layer = call.layer or 0
        if measuring.last is None:
            measuring.outputs[layer] = output.out[:, :, -1].detach()
            return output
        here, there = output.out.detach().chunk(2)
        heads = self._choice(_at(here, measuring.last), there[:, :, -1], measuring.pictures)
        measuring.heads[layer] = heads
        return self._scaled(output, torch.cat([heads, heads]))

    def _heads(self, call: AttentionCall, out: Tensor, roles: TokenRoles) -> Tensor | None:
        """The heads [B, H] to strengthen in a call."""
        now, layer = self.keeper.of(call), call.layer or 0
        known, reference = now.notes.get("heads"), now.notes.get("reference")
        if roles.position or (call.recomputed and layer in now.states):
            state: HeadState | None = now.states.get(layer)
            if state is None:
                return None
            at = None if call.recomputed else state.marks.rows(call, roles.offset)
            if at is not None:
                state = HeadState(state.heads[at], Marks(state.marks.bits[at], state.marks.start))
                now.states[layer] = state
            return state.heads
        if known is not None:
            heads = _repeated(known[layer], call)
        elif reference is not None:
            last = _at(out.detach(), last_tokens(roles))
            heads = self._choice(last, reference.outputs[layer], reference.pictures)
        else:
            return None
        now.states[layer] = HeadState(heads, Marks.of(call, roles.offset, roles.position + call.num_queries))
        return heads

    def _choice(self, here: Tensor, there: Tensor, pictures: Tensor) -> Tensor:
        """Heads [B, H] from outputs [B, H, d] at the last token with and without pictures."""
        config = self.keeper.config
        vhd = vision_aware_divergence(here, there, relative=config.metric == "relative")
        if config.outlier_filter:
            vhd = reject_negative_heads(vhd, there.to(vhd.dtype).square().sum(-1))
        return select_heads(vhd) & pictures[:, None]


def _at(out: Tensor, place: Tensor) -> Tensor:
    """Outputs [B, H, d] at one place [B] of each row of [B, H, S, d]."""
    return out[torch.arange(len(out), device=out.device), :, place]


def _repeated(heads: Tensor, call: AttentionCall) -> Tensor:
    """Heads of prompts for the rows of a call, of which each prompt may have several (beams)."""
    batch = call.q.shape[0]
    if batch % len(heads):
        raise RuntimeError(f"{call.name}: heads are known of {len(heads)} prompts, the call has {batch} rows")
    return heads.to(call.q.device).repeat_interleave(batch // len(heads), 0)

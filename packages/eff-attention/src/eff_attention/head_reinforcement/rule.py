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
        factor: What their outputs are multiplied by [B, H, 1, 1].
        marks: Of the keys of the prompt.
    """

    heads: Tensor
    factor: Tensor
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
        state = self._state(call, output.out, checked_roles(call))
        return output if state is None else output.replace(out=output.out * state.factor.to(output.out))

    def _factor(self, heads: Tensor) -> Tensor:
        """What the outputs of heads [B, H] are multiplied by, float32 [B, H, 1, 1]."""
        return torch.where(heads, self.keeper.config.alpha, 1.0)[:, :, None, None]

    def _measured(self, call: AttentionCall, output: AttentionOutput, measuring: Measuring) -> AttentionOutput:
        """A pass without pictures, or one of rows with and without."""
        layer = call.layer or 0
        if measuring.last is None:
            measuring.outputs[layer] = output.out[:, :, -1].detach()
            return output
        here, there = output.out.detach().chunk(2)
        heads = self._choice(_at(here, measuring.last), there[:, :, -1], measuring.pictures)
        measuring.heads[layer] = heads
        factor = self._factor(torch.cat([heads, heads])).to(output.out)
        return output.replace(out=output.out * factor)

    def _state(self, call: AttentionCall, out: Tensor, roles: TokenRoles) -> HeadState | None:
        """The heads to strengthen in a call."""
        now, layer = self.keeper.of(call), call.layer or 0
        known, reference = now.notes.get("heads"), now.notes.get("reference")
        if roles.position or (call.recomputed and layer in now.states):
            state: HeadState | None = now.states.get(layer)
            if state is None:
                return None
            at = None if call.recomputed else state.marks.rows(call, roles.offset)
            if at is not None:
                marks = Marks(state.marks.bits[at], state.marks.start)
                state = now.states[layer] = HeadState(state.heads[at], state.factor[at], marks)
            return state
        if known is not None:
            heads = _repeated(known[layer], call)
        elif reference is not None:
            last = _at(out.detach(), last_tokens(roles))
            heads = self._choice(last, reference.outputs[layer], reference.pictures)
        else:
            return None
        marks = Marks.of(call, roles.offset, roles.position + call.num_queries)
        # In the dtype of the outputs, so that a step need not make it so.
        state = now.states[layer] = HeadState(heads, self._factor(heads).to(out), marks)
        return state

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

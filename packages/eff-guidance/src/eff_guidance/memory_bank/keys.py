"""A slowly moving copy of the student up to the block that is looked at, for representations that go stale slowly."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eff_guidance.training.students import picture_tokens


class _ReachedError(Exception):
    """The block has run: the rest of the model need not."""


class KeyEncoder(nn.Module):
    """Running averages of a student and of the projection head.

    Args:
        student: The model; it is copied, without the blocks behind the one that is looked at.
        blocks: Names of its blocks in order.
        block: Name of the one that is looked at.
        head: The projection head; it is copied.
        decay: Of the averages, per step.
    """

    def __init__(self, student: nn.Module, blocks: Sequence[str], block: str, head: nn.Module, decay: float) -> None:
        super().__init__()
        self.block, self.decay = block, decay
        behind = list(blocks)[list(blocks).index(block) + 1 :]
        # What runs after the block is never reached; an empty module in its place takes no memory.
        kept = {student.get_submodule(name): nn.Identity() for name in behind}
        memo: dict[int, Any] = {id(old): new for old, new in kept.items()}
        self.student: nn.Module = copy.deepcopy(student, memo).requires_grad_(False).eval()
        self.head: nn.Module = copy.deepcopy(head).requires_grad_(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Picture tokens [B, N, D] of the block, for the arguments of the student's forward."""
        states: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            states.append(picture_tokens(module, output))
            raise _ReachedError

        hook = self.student.get_submodule(self.block).register_forward_hook(stop)
        try:
            self.student(*args, **kwargs)
        except _ReachedError:
            pass
        finally:
            hook.remove()
        return states[0]

    @torch.no_grad()
    def follow(self, student: nn.Module, head: nn.Module) -> None:
        """Move by one step towards the student and its head; buffers are taken over."""
        for ours, theirs in ((self.student, student), (self.head, head)):
            new = dict(theirs.named_parameters())
            for name, p in ours.named_parameters():
                p.lerp_(new[name].to(p.dtype), 1 - self.decay)
            new_buffers = dict(theirs.named_buffers())
            for name, b in ours.named_buffers():
                b.copy_(new_buffers[name])

    def train(self, mode: bool = True) -> KeyEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

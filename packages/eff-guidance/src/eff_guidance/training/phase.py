"""A loss with hooks in a model, that is switched off once and for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from eff_kernels.edit import Handle
from eff_kernels.edit.attention.sdpa import recomputing
from torch import Tensor, nn

from eff_guidance.training.students import picture_tokens
from eff_guidance.training.triggers import Closure, Trigger


class PhasedLoss(nn.Module):
    """Base of losses on what a student computes inside: hooks, what they saw, a trigger, and a state.

    The student is not a submodule: its state_dict, and that of the loss, keep to themselves. Copies and pickles of the
    loss are attached to no student; copies of the student carry no hooks.

    Args:
        student: The model in training, as it is or inside DistributedDataParallel or torch.compile's wrapper.
        trigger: Ends the phase; None: only `terminate` does.
    """

    def __init__(self, trigger: Trigger | None = None) -> None:
        super().__init__()
        self.trigger = trigger
        self.active = True
        self._handle: Handle | None = None
        self._seen: dict[Any, Any] = {}

    def attach(self, student: nn.Module) -> Self:
        """Put the hooks into a student, out of the one that they were in before; nothing after the phase."""
        self.remove()
        if self.active:
            self._handle = Handle()
            try:
                self._hook(student, self._handle)
            except Exception:
                self.remove()
                raise
        return self

    def _hook(self, student: nn.Module, handle: Handle) -> None:
        raise NotImplementedError

    @property
    def attached(self) -> bool:
        """Whether there are hooks in a student."""
        return self._handle is not None

    def remove(self) -> None:
        """Take the hooks out of the student, whose outputs are then those of before, bit for bit."""
        self._seen.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def terminate(self) -> None:
        """End the phase for good: no hooks, no cost, losses of zero; parameters of the loss are frozen."""
        self.active = False
        self.remove()
        self.requires_grad_(False)
        for p in self.parameters():
            p.grad = None

    def update(self, step: int, closure: Closure | None = None) -> bool:
        """Ask the trigger, before step number ``step`` (from 0), and end the phase if it says so.

        Returns:
            Whether the phase is still on.
        """
        if self.active and self.trigger is not None and self.trigger.update(step, closure):
            self.terminate()
        return self.active

    def sync_gradients(self, group: Any = None) -> None:
        """Average the gradients of this module over the processes; nothing without them or after the phase.

        All processes must call this; one that had no batch counts with gradients of 0.
        """
        if not self.active or not (dist.is_available() and dist.is_initialized()):
            return
        for p in self.parameters():
            if p.requires_grad:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)

    def get_extra_state(self) -> dict[str, Any]:
        """State beside the parameters: part of ``state_dict()``."""
        return {"active": self.active, "trigger": None if self.trigger is None else self.trigger.state_dict()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over `get_extra_state`; a state of after the phase ends it here too.

        Raises:
            ValueError: the state is of before the end of the phase, which has come here.
        """
        if state["active"] and not self.active:
            raise ValueError("this loss has been switched off for good; load an earlier state into a new one")
        if self.trigger is not None and state["trigger"] is not None:
            self.trigger.load_state_dict(state["trigger"])
        if not state["active"]:
            self.terminate()

    def _keep_tokens(self, handle: Handle, block: nn.Module, key: Any) -> None:
        """Keep the picture tokens that a block puts out, as ``self._seen[key]``."""

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.active and not recomputing():
                self._seen[key] = picture_tokens(module, output)

        handle.hook(block, keep)

    def _take(self, key: Any) -> Any:
        """What a hook kept in the last forward pass, once.

        Raises:
            RuntimeError: the student has not run since, is not attached, or ran without gradients.
        """
        found = self._seen.pop(key, None)
        if found is None:
            why = "run the student before each call" if self.attached else "attach() the loss to a student"
            raise RuntimeError(f"there are no hidden states of the student; {why}")
        tensor = found if isinstance(found, Tensor) else found[0]
        if torch.is_grad_enabled() and not tensor.requires_grad:
            raise RuntimeError(
                "the student's hidden states carry no gradient: it ran under torch.no_grad, is frozen, or checkpoints "
                "its blocks reentrantly (use use_reentrant=False)"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_seen": {}}

"""Distillation of attention outputs from the dense model in full precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from eff_kernels.edit import Handle, Where, select
from torch import Tensor, nn


class AttentionOutputDistiller(Handle):
    """Mean over attention modules of the squared error between a student's outputs and its teacher's.

    Run both models on the same batch, the teacher without gradient, then take `loss`. `remove`, or leaving the context,
    takes the hooks away.

    Args:
        teacher: The dense model.
        student: The model in training.
        where: The modules to compare, as for `eff_kernels.select`; of a tuple of outputs the first counts.
        match: ``"name"``: modules of the same name belong together; ``"order"``: the first to the first, and so on.

    Raises:
        ValueError: ``where`` takes in nothing, or the modules do not match.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, where: Where, *, match: Literal["name", "order"] = "name"
    ) -> None:
        super().__init__()
        if match not in ("name", "order"):
            raise ValueError(f"match={match!r}; use 'name' or 'order'")
        ours: dict[str, nn.Module] = dict(select(student, where))
        theirs: dict[str, nn.Module] = dict(select(teacher, where))
        if not ours or not theirs:
            raise ValueError(
                f"where={where!r} takes in {len(ours)} modules of the student, {len(theirs)} of the teacher"
            )
        if match == "name" and ours.keys() != theirs.keys():
            raise ValueError(
                f"modules in one model only: {sorted(ours.keys() ^ theirs.keys())}; match='order' may help"
            )
        if len(ours) != len(theirs):
            raise ValueError(f"the student has {len(ours)} such modules, the teacher {len(theirs)}")
        self._outputs: dict[tuple[str, int], Tensor] = {}
        self._names = list(ours)
        for i, name in enumerate(ours):
            other = theirs[name] if match == "name" else list(theirs.values())[i]
            for role, module in (("student", ours[name]), ("teacher", other)):
                self.on_remove(module.register_forward_hook(self._keep(role, i)).remove)

    def _keep(self, role: str, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self._outputs[role, i] = first.detach() if role == "teacher" else first

        return hook

    def loss(self) -> Tensor:
        """The error of the last forward pass of both models, which is then forgotten.

        Raises:
            RuntimeError: one of them has not run since.
            ValueError: outputs of different shapes.
        """
        errors = []
        for i, name in enumerate(self._names):
            missing = [role for role in ("teacher", "student") if (role, i) not in self._outputs]
            if missing:
                raise RuntimeError(
                    f"{name}: no output of the {missing[0]}; run teacher(x) and student(x) before loss()"
                )
            ours, theirs = self._outputs["student", i], self._outputs["teacher", i]
            if ours.shape != theirs.shape:
                raise ValueError(f"{name}: the student gives {list(ours.shape)}, the teacher {list(theirs.shape)}")
            errors.append(F.mse_loss(ours.float(), theirs.float()))
        self._outputs.clear()
        return torch.stack(errors).mean()


def cosine_weight(step: int, total: int, maximum: float = 0.1, minimum: float = 0.01) -> float:
    """Weight of the distillation loss at a step: from ``maximum`` down to ``minimum`` along half a cosine.

    Raises:
        ValueError: ``total`` is not positive.
    """
    if total < 1:
        raise ValueError(f"total={total}; use the number of steps, at least 1")
    progress = min(max(step / total, 0.0), 1.0)
    return minimum + (maximum - minimum) * 0.5 * (1 + math.cos(math.pi * progress))

"""Teach the modules of a model what those of a frozen teacher put out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eff_kernels.edit.handle import Handle
from eff_kernels.edit.select import Where, select


class Distiller(Handle):
    """Mean over modules of the error between a student's outputs and its teacher's.

    Run both models on the same batch (the teacher under ``torch.no_grad``), then take `loss`. ``remove()``, or leaving
    the context, takes the hooks away; copies of the models have none.

    Args:
        student: The model in training.
        teacher: The model to learn from.
        where: The modules to compare, as for `select`; of a tuple of outputs the first counts.
        match: ``"name"``: modules of the same name belong together; ``"order"``: the first to the first, and so on.
        weight: Factor of the loss, a number or a function of the progress of training, 0 .. 1, such as `cosine`.
        error: Of a module's output against the teacher's, both float32; the mean squared error by default.

    Raises:
        ValueError: ``where`` selects nothing, or the modules do not match.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        where: Where,
        *,
        match: Literal["name", "order"] = "name",
        weight: float | Callable[[float], float] = 1.0,
        error: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    ) -> None:
        super().__init__()
        self.weight, self.error = weight, error
        self._outputs: dict[tuple[str, int], Tensor] = {}
        pairs = match_modules(student, teacher, where, match)
        self.layers = tuple(pairs)
        """Names of the student's modules."""
        for i, (ours, theirs) in enumerate(pairs.values()):
            self.hook(ours, self._keep("student", i))
            self.hook(theirs, self._keep("teacher", i))

    def _keep(self, side: str, i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() < 0:  # else a checkpoint runs the layer again, for its backward
                self._outputs[side, i] = output[0] if isinstance(output, tuple) else output

        return hook

    def loss(self, progress: float = 0.0) -> Tensor:
        """The weighted error of the last forward pass of both models, which is then forgotten.

        Raises:
            RuntimeError: one of them has not run since, or the student ran without gradients although they are wanted
                now: under ``torch.no_grad``, or within reentrant checkpointing.
            ValueError: outputs are of different shapes.
        """
        outputs, self._outputs = self._outputs, {}
        errors = []
        for i, name in enumerate(self.layers):
            if missing := [side for side in ("student", "teacher") if (side, i) not in outputs]:
                raise RuntimeError(
                    f"{name}: no output of the {missing[0]}; run student(x) and teacher(x) before loss()"
                )
            ours, theirs = outputs["student", i], outputs["teacher", i].detach()
            if ours.shape != theirs.shape:
                raise ValueError(f"{name}: the student gives {list(ours.shape)}, the teacher {list(theirs.shape)}")
            errors.append(self.error(ours.float(), theirs.float()))
        found = torch.stack(errors).mean()
        if torch.is_grad_enabled() and not found.requires_grad:
            raise RuntimeError(
                "the student's outputs carry no gradient: it ran under torch.no_grad, is frozen, or checkpoints its "
                "layers reentrantly (use use_reentrant=False); to measure only, call loss() under torch.no_grad"
            )
        return found * (self.weight(progress) if callable(self.weight) else self.weight)


def match_modules(
    student: nn.Module, teacher: nn.Module, where: Where, match: str = "name"
) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Pairs of modules of two models, by the student's names.

    Raises:
        ValueError: ``where`` selects nothing, or the modules do not match.
    """
    if match not in ("name", "order"):
        raise ValueError(f"match={match!r}; use 'name' or 'order'")
    ours: dict[str, nn.Module] = dict(select(student, where))
    theirs: dict[str, nn.Module] = dict(select(teacher, where))
    if not ours or not theirs:
        raise ValueError(f"where={where!r} selects {len(ours)} modules of the student, {len(theirs)} of the teacher")
    if match == "name" and ours.keys() != theirs.keys():
        raise ValueError(
            f"modules that only one of the models has: {sorted(ours.keys() ^ theirs.keys())}; match='order' may help"
        )
    if len(ours) != len(theirs):
        raise ValueError(f"the student has {len(ours)} such modules, the teacher {len(theirs)}")
    others = theirs if match == "name" else dict(zip(ours, theirs.values(), strict=True))
    return {name: (module, others[name]) for name, module in ours.items()}


def cosine(start: float, end: float) -> Callable[[float], float]:
    """Weight that falls from ``start`` to ``end`` along half a cosine, for progress in 0 .. 1."""
    return lambda progress: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))

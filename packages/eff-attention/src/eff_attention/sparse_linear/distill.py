"""Distil dense attention into a sparse-linear student, layer by layer (Lite3R, arXiv 2605.11354)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from eff_kernels import Handle
from torch import Tensor, nn

from eff_attention.sparse_linear.apply import sla_modules


def cosine(start: float, end: float) -> Callable[[float], float]:
    """Weight that falls from ``start`` to ``end`` along half a cosine, for progress in 0 .. 1."""
    return lambda progress: end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


class AttentionDistiller:
    """Mean over layers of the mean squared error between the attention outputs of student and teacher.

    Compared are the outputs of the host modules, after their output projection. Run both models on the same batch (the
    teacher under ``torch.no_grad``), then ask for `loss`. A context manager; ``remove()`` takes the hooks away.

    Args:
        student: A model with `apply_sla` applied.
        teacher: The same architecture, dense.
        layers: Names of the host modules; all that have sparse-linear attention by default.
        weight: Factor by the progress of training, 0 .. 1.

    Raises:
        ValueError: no layers, or the teacher lacks one of them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Sequence[str] | None = None,
        weight: Callable[[float], float] | None = None,
    ) -> None:
        self.layers = tuple(layers if layers is not None else (n for n, _ in sla_modules(student)))
        if not self.layers:
            raise ValueError("the student has no sparse-linear attention to distil into")
        self.weight = weight or cosine(0.1, 0.01)
        self._seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        self._handle = Handle()
        for side, model in (("student", student), ("teacher", teacher)):
            modules = dict(model.named_modules())
            missing = [n for n in self.layers if n not in modules]
            if missing:
                self.remove()
                raise ValueError(f"the {side} has no modules {missing}")
            for name in self.layers:
                hook = modules[name].register_forward_hook(self._keep(side, name))
                self._handle.on_remove(hook.remove)

    def loss(self, progress: float = 0.0) -> Tensor:
        """The weighted error of the last forward of both models.

        Raises:
            RuntimeError: one of the models has not run since the last call.
        """
        student, teacher = self._seen["student"], self._seen["teacher"]
        missing = [n for n in self.layers if n not in student or n not in teacher]
        if missing:
            raise RuntimeError(f"student and teacher have to run before each loss; nothing was seen of {missing}")
        errors = [(student[n] - teacher[n].detach()).float().square().mean() for n in self.layers]
        student.clear()
        teacher.clear()
        return self.weight(progress) * torch.stack(errors).mean()

    def remove(self) -> None:
        """Take the hooks away."""
        self._handle.remove()

    def __enter__(self) -> AttentionDistiller:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _keep(self, side: str, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._seen[side][name] = output[0] if isinstance(output, tuple) else output

        return hook

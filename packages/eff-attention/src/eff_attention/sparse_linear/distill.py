"""Distil dense attention into a sparse-linear student, layer by layer (Lite3R, arXiv 2605.11354)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eff_kernels.edit import Distiller, cosine
from torch import nn

from eff_attention.sparse_linear.apply import sla_modules


class AttentionDistiller(Distiller):
    """Mean over layers of the mean squared error between the attention outputs of student and teacher.

    Compared are the outputs of the host modules, after their output projection; see `eff_kernels.edit.Distiller`.

    Args:
        student: A model with `apply_sla` applied.
        teacher: The same architecture, dense.
        layers: Names of the host modules; all that have sparse-linear attention by default.
        weight: Factor by the progress of training, 0 .. 1.

    Raises:
        ValueError: no layers, or one of the models lacks one of them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Sequence[str] | None = None,
        weight: Callable[[float], float] | None = None,
    ) -> None:
        names = {n for n, _ in sla_modules(student)} if layers is None else set(layers)
        if not names:
            raise ValueError("the student has no sparse-linear attention to distil into")
        super().__init__(student, teacher, lambda n, m: n in names, weight=weight or cosine(0.1, 0.01))

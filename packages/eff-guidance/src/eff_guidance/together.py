"""What methods tell one another while a denoiser runs: they do not import one another, and none knows who listens.

Each message holds in the thread that gives it, for as long as its ``with`` block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from eff_kernels.edit.attention.forward import Forward
from torch import Tensor

LayoutRole = Literal["none", "scene", "branch"]

_rows: ContextVar[Rows | None] = ContextVar("eff_rows", default=None)
_extra: ContextVar[ExtraPass | None] = ContextVar("eff_extra_pass", default=None)
_parts: ContextVar[bool] = ContextVar("eff_parts", default=False)


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch have no prompt, where they are not those that the pipeline says.

    Attributes:
        unconditional: Rows without prompt at the front of each group.
        groups: Groups of rows of one size that follow each other, such as the branches of a layout.
        layout: Whether a layout draws: "scene" for the whole picture beside its layers, "branch" for layers, which hold
            the picture's tokens in part.
    """

    unconditional: int
    groups: int = 1
    layout: LayoutRole = "none"

    def prompted(self, x: Tensor) -> Tensor:
        """Those of a batch [B, ...] that have a prompt."""
        return x[self.unconditional :] if self.groups == 1 else self._apart(x)[:, self.unconditional :].flatten(0, 1)

    def padded(self, x: Tensor) -> Tensor:
        """The whole batch again from what `prompted` has given, with zeros in the other rows."""
        filled = F.pad(self._apart(x), (0, 0) * (x.dim() - 1) + (self.unconditional, 0))
        return filled.flatten(0, 1)

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.groups, x.shape[0] // self.groups))


@dataclass(frozen=True)
class ExtraPass:
    """One more evaluation of a denoiser in a step; ``scale * (with prompt - this one)`` is added to the prediction.

    Attributes:
        scale: The factor.
        joined: Whether it runs in one batch behind the rows of the other passes.
    """

    scale: float
    joined: bool = False


class ExtraPasses(Forward):
    """Base of forwards of a denoiser that evaluate it more often than they are called, and tell so."""


def current_rows() -> Rows | None:
    """What was told of the rows that run now."""
    return _rows.get()


def current_layout() -> LayoutRole:
    """What the rows that run now are to a layout."""
    told = _rows.get()
    return "none" if told is None else told.layout


def current_extra() -> ExtraPass | None:
    """The extra pass that runs now."""
    return _extra.get()


def in_parts() -> bool:
    """Whether a rule is asking for one attention in parts, whose queries are not all of its tokens."""
    return _parts.get()


def tell_rows(rows: Rows) -> contextlib.AbstractContextManager[None]:
    """Say which rows have no prompt."""
    return _told(_rows, rows)


def tell_extra(extra: ExtraPass) -> contextlib.AbstractContextManager[None]:
    """Say that an extra pass runs."""
    return _told(_extra, extra)


def tell_parts() -> contextlib.AbstractContextManager[None]:
    """Say that one attention is asked for in parts."""
    return _told(_parts, True)


@contextlib.contextmanager
def _told(of: ContextVar[Any], value: Any) -> Iterator[None]:
    token = of.set(value)
    try:
        yield
    finally:
        of.reset(token)

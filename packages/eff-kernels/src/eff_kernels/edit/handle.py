"""A handle remembers how to undo each change to a model, and what was done."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import nn

from eff_kernels.edit.report import Report
from eff_kernels.edit.select import inner_module, places


class Handle:
    """Undoes changes to a model: latest first, once.

    Use it as a context manager for a change that lasts one block. `remove` may be called again without effect.

    Attributes:
        report: What was changed and what was skipped; empty unless the maker of the handle passed one.
    """

    def __init__(self, report: Report | None = None) -> None:
        self.report = Report("edit") if report is None else report
        self._undo: list[Callable[[], object]] = []

    def on_remove(self, undo: Callable[[], object]) -> None:
        """Add a function that takes one change back."""
        self._undo.append(undo)

    def replace(
        self, model: nn.Module, name: str, new: nn.Module, *, back: Callable[[], nn.Module] | None = None
    ) -> None:
        """Replace the module ``name`` as `replace_module` does; `remove` puts the old one back.

        ``back`` is for a new module that holds the old one, in which others may have changed it meanwhile: it gives
        what `remove` puts back.

        `remove` raises RuntimeError if something else has been put there since: later changes are to be removed first.
        """
        old = inner_module(model, name)
        held = places(model, old)

        def put_back() -> None:
            if any(parent._modules.get(leaf) is not new for parent, leaf in held):
                raise RuntimeError(f"{name!r} was changed again after this change; remove the later change first")
            for parent, leaf in held:
                setattr(parent, leaf, old if back is None else back())

        for parent, leaf in held:
            setattr(parent, leaf, new)
        self.on_remove(put_back)

    def hook(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs, output)`` after each forward of a module, until `remove`.

        What it returns, unless None, takes the place of the output. Copies and pickles of the module do not carry it.
        """
        self.on_remove(module.register_forward_hook(_Hook(hook), with_kwargs=True).remove)

    @property
    def active(self) -> bool:
        """Whether there is something left to undo."""
        return bool(self._undo)

    def remove(self) -> None:
        """Take all changes back, latest first; if one raises, it and the earlier ones stay, to be tried again."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


class _Hook:
    """A hook that stays with its module: copies and pickles have `_nothing` in its place."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.function(module, args, kwargs, output)

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _get_nothing, ()


def _nothing(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """What a copy has in the place of a hook."""


def _get_nothing() -> Callable[..., None]:
    return _nothing

"""The one way to change a model: choose modules, change them, report what was done, and take it back.

`select` finds modules by name or predicate. `Handle` remembers how to undo each change and restores the model bit for
bit. `Report` lists what was changed and what was skipped with the reason; nothing is skipped silently.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)
Where = str | Sequence[str] | Callable[[str, nn.Module], bool]


def matches(name: str, pattern: str) -> bool:
    """Whether a module's dotted name fits a pattern.

    ``re:...`` is a regular expression that must fit the whole name; a pattern with ``*``, ``?`` or ``[`` is a shell
    pattern for the whole name; anything else must be the name or its last parts: ``"q_proj"`` fits
    ``"layers.0.attn.q_proj"``.
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def fits(where: Where, name: str, module: nn.Module) -> bool:
    """Whether ``where`` (a pattern, several, or ``predicate(name, module)``) takes in this module."""
    if callable(where):
        return where(name, module)
    return any(matches(name, p) for p in ([where] if isinstance(where, str) else where))


def select(model: nn.Module, where: Where = "*", kind: type[M] = nn.Module) -> Iterator[tuple[str, M]]:  # type: ignore[assignment]
    """Yield ``(name, module)`` for each module of class ``kind`` that ``where`` takes in, in the model's order.

    A module that is reached by several names is yielded once, under the first that fits.
    """
    seen: set[nn.Module] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in seen and isinstance(module, kind) and fits(where, name, module):
            seen.add(module)
            yield name, module


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put ``new`` wherever the module ``name`` is held, and return that module.

    A module that is shared stays shared: all places that hold it get ``new``.

    Raises:
        ValueError: ``name`` is empty: the model itself cannot be replaced inside itself.
        AttributeError: the model has no module of that name.
    """
    old = _inner_module(model, name)
    for parent, leaf in _places(model, old):
        setattr(parent, leaf, new)
    return old


def _inner_module(model: nn.Module, name: str) -> nn.Module:
    if not name:
        raise ValueError("cannot replace the model itself; wrap it or pass its parent")
    return model.get_submodule(name)


def _places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """All (parent, attribute) that hold a module."""
    return [(parent, leaf) for parent in model.modules() for leaf, child in parent._modules.items() if child is module]


class Handle:
    """Undoes changes to a model: latest first, once.

    Use it as a context manager for a change that lasts one block. `remove` may be called again without effect.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def on_remove(self, undo: Callable[[], object]) -> None:
        """Add a function that takes one change back."""
        self._undo.append(undo)

    def replace(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """Replace the module ``name`` as `replace_module` does; `remove` puts the old one back.

        `remove` raises RuntimeError if something else has been put there since: later changes are to be removed first.
        """
        old = _inner_module(model, name)
        places = _places(model, old)

        def put_back() -> None:
            if any(parent._modules.get(leaf) is not new for parent, leaf in places):
                raise RuntimeError(f"{name!r} was changed again after this change; remove the later change first")
            for parent, leaf in places:
                setattr(parent, leaf, old)

        for parent, leaf in places:
            setattr(parent, leaf, new)
        self.on_remove(put_back)

    @property
    def active(self) -> bool:
        """Whether there is something left to undo."""
        return bool(self._undo)

    def remove(self) -> None:
        """Take all changes back, latest first; if one raises, it and the earlier ones stay, to be tried again."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.remove()


class SkippedModulesError(ValueError):
    """A strict edit met modules that it had to leave as they were."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One module of a report. ``reason`` is empty for a changed module; sizes are in bytes."""

    name: str
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(slots=True)
class Report:
    """What an edit did to a model."""

    action: str
    changed: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    def change(self, name: str, *, bytes_before: int = 0, bytes_after: int = 0) -> None:
        """Note a module that was changed."""
        self.changed.append(Entry(name, "", bytes_before, bytes_after))

    def skip(self, name: str, reason: str, *, size: int = 0) -> None:
        """Note a module that was left as it was, and why."""
        self.skipped.append(Entry(name, reason, size, size))

    @property
    def bytes_before(self) -> int:
        """Size of all reported modules before the edit."""
        return sum(e.bytes_before for e in (*self.changed, *self.skipped))

    @property
    def bytes_after(self) -> int:
        """Size of all reported modules after the edit."""
        return sum(e.bytes_after for e in (*self.changed, *self.skipped))

    def raise_if_skipped(self) -> None:
        """Turn skips into an error that names each of them (what ``strict=True`` does)."""
        if self.skipped:
            lines = "\n".join(f"  {e.name}: {e.reason}" for e in self.skipped)
            raise SkippedModulesError(f"{self.action}: {len(self.skipped)} modules were skipped\n{lines}")

    def __str__(self) -> str:
        lines = [f"{self.action}: {len(self.changed)} changed, {len(self.skipped)} skipped"]
        if self.bytes_before:
            lines[0] += f", {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB"
        lines += [f"  {e.name}: skipped, {e.reason}" for e in self.skipped]
        return "\n".join(lines)

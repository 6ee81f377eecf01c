"""Which modules of a model: patterns, predicates, and putting another module in a place."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Sequence
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
    """Whether ``where`` (a pattern, several, or ``predicate(name, module)``) selects this module."""
    if callable(where):
        return where(name, module)
    return any(matches(name, p) for p in ([where] if isinstance(where, str) else where))


def select(model: nn.Module, where: Where = "*", kind: type[M] = nn.Module) -> Iterator[tuple[str, M]]:  # type: ignore[assignment]
    """Yield ``(name, module)`` for each module of class ``kind`` that ``where`` selects, in the model's order.

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
    old = inner_module(model, name)
    for parent, leaf in places(model, old):
        setattr(parent, leaf, new)
    return old


def inner_module(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, which must not be the model itself."""
    if not name:
        raise ValueError("cannot replace the model itself; wrap it or pass its parent")
    return model.get_submodule(name)


def places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """All (parent, attribute) that hold a module."""
    return [(parent, leaf) for parent in model.modules() for leaf, child in parent._modules.items() if child is module]

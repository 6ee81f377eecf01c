"""Methods on one model: what several of them together must hold, in any order of applying and of taking back.

A `Part` is a method as it is put into a model; a `Family` is a model and the parts that fit it. `check` puts parts
together and looks at each promise; `refusals` of a family names the pairs that are refused, with the text.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from eff_quant import dequantize_
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Part:
    """A method.

    Attributes:
        name: Of the method, as on the page.
        package: Where it lives.
        kind: An "edit" gives a handle, a "rewrite" changes weights for good, a "measure" looks on.
        apply: Changes a model.
        zero: The same with strength 0; None where there is no such setting.
        arguments: Further arguments of the model, from its data.
        rule: Whether it is a rule on attention, of which several may meet.
        own: Whether it has weights of its own in float in the place of some of the model's, which are not stored with
            the others: beside those its strength 0 is not looked at.
        context: What has to be entered around a run, from what ``apply`` returned.
    """

    name: str
    package: str
    apply: Callable[[Any], Any]
    kind: Literal["edit", "rewrite", "measure"] = "edit"
    zero: Callable[[Any], Any] | None = None
    arguments: Callable[[Tensor], dict[str, Any]] | None = None
    rule: bool = False
    own: bool = False
    context: Callable[[Any], Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model and the parts that fit it.

    Attributes:
        name: As on the page.
        make: A new model, the same each time.
        run: ``run(model, data, arguments)`` gives a tensor.
        data: Of the runs.
        parts: By name.
        refusals: By names of a pair, in the order of applying: a regular expression of the error's text.
        held: By names of a pair: what may not be taken back first, and the text that says so.
        apart: By names of a pair: why undoing is not asked for in this order.
        bound: Relative difference that the same weights in float may make.
        copies: Whether copies of the model are looked at.
    """

    name: str
    make: Callable[[], nn.Module]
    run: Callable[[Any, Any, Any], Tensor]
    data: Callable[[], Any]
    parts: Mapping[str, Part]
    refusals: Mapping[tuple[str, str], str] = field(default_factory=dict)
    held: Mapping[tuple[str, str], str] = field(default_factory=dict)
    apart: Mapping[tuple[str, str], str] = field(default_factory=dict)
    bound: float = 1e-3
    copies: bool = True

    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of names, each in both orders, but for two ways of storing weights and two that look on."""
        return [
            (a, b)
            for a, b in itertools.permutations(self.parts, 2)
            if not (self.parts[a].kind == self.parts[b].kind and self.parts[a].kind != "edit")
        ]


class Stack:
    """Parts in a model.

    Args:
        family: Of the model.
        parts: In the order of applying; those in ``off`` with strength 0.
        off: Names.
        twin: Whether stored weights become float again at once: the same numbers, not stored.
    """

    def __init__(self, family: Family, parts: Sequence[Part], *, off: Sequence[str] = (), twin: bool = False) -> None:
        self.family, self.parts, self.handles = family, [], []
        self.model = family.make()
        for part in parts:
            apply = part.zero if part.name in off else part.apply
            assert apply is not None
            self.handles.append(apply(self.model))
            self.parts.append(part)
            if twin and part.kind == "rewrite":
                dequantize_(self.model, dtype=torch.float32)

    def run(self, model: Any = None) -> Tensor:
        """The output of the family's data."""
        data = self.family.data()
        arguments: dict[str, Any] = {"parts": self.parts}
        with torch.no_grad(), contextlib.ExitStack() as entered:
            for part, handle in zip(self.parts, self.handles, strict=True):
                if part.context is not None:
                    entered.enter_context(part.context(handle if handle is not None else self.model))
            return self.family.run(self.model if model is None else model, data, arguments)

    def remove(self, index: int) -> None:
        """Take one part back."""
        self.handles.pop(index).remove()
        self.parts.pop(index)


_OUTPUTS: dict[tuple[Any, ...], Tensor] = {}
_STATES: dict[tuple[Any, ...], dict[str, Tensor]] = {}


def output(family: Family, parts: Sequence[Part], *, off: Sequence[str] = (), twin: bool = False) -> Tensor:
    """What a new stack gives; computed once."""
    key = family.name, tuple(part.name for part in parts), tuple(off), twin
    if key not in _OUTPUTS:
        _OUTPUTS[key] = Stack(family, parts, off=off, twin=twin).run()
    return _OUTPUTS[key]


def state(family: Family, parts: Sequence[Part]) -> dict[str, Tensor]:
    """Weights of a new stack; made once."""
    key = family.name, tuple(part.name for part in parts)
    if key not in _STATES:
        _STATES[key] = Stack(family, parts).model.state_dict()
    return _STATES[key]


def without(parts: Sequence[Part], part: Part) -> list[Part]:
    """The other parts."""
    return [p for p in parts if p is not part]


def acts(family: Family, parts: Sequence[Part]) -> None:
    """Each part has its effect beside the others, and what only looks on has none."""
    together = output(family, parts)
    assert together.isfinite().all(), "the output is not finite"
    for part in parts:
        same = torch.equal(output(family, without(parts, part)), together)
        if part.kind == "measure":
            assert same, f"{part.name} only looks on, and changes the output"
        else:
            assert not same, f"{part.name} has no effect beside the others"


def zero_is_nothing(family: Family, parts: Sequence[Part]) -> None:
    """A part with strength 0 is as if it were not there, bit for bit.

    Rules that are not alone on an attention may take another way to the same numbers: up to rounding then.
    """
    for part in parts:
        rounded = any(other.package == "eff-quant" for other in without(parts, part))
        if part.zero is not None and not (part.own and rounded):
            found, wanted = output(family, parts, off=[part.name]), output(family, without(parts, part))
            rules = part.rule and any(other.rule for other in without(parts, part))
            same = torch.equal(found, wanted) or (rules and (found - wanted).norm() < 1e-4 * wanted.norm())
            assert same, f"{part.name} with strength 0 is not as if it were not there"


def stored_is_float(family: Family, parts: Sequence[Part]) -> None:
    """Stored weights give what the same weights in float give."""
    if any(part.kind == "rewrite" for part in parts):
        wanted = output(family, parts, twin=True)
        error = float((output(family, parts) - wanted).norm() / wanted.norm())
        assert error < family.bound, f"the same weights in float differ by {error:.3g}; wanted < {family.bound:g}"


def copies(family: Family, parts: Sequence[Part]) -> None:
    """A copy of the model gives the same outputs."""
    if family.copies and not any(part.context for part in parts):
        stack = Stack(family, parts)
        found = stack.run(copy.deepcopy(stack.model))
        assert torch.equal(found, output(family, parts)), "a copy gives other outputs"


def undone_from_the_last(family: Family, parts: Sequence[Part]) -> None:
    """The last applied goes first."""
    undo(family, parts, backwards=True)


def undone_from_the_first(family: Family, parts: Sequence[Part]) -> None:
    """The first applied goes first."""
    undo(family, parts, backwards=False)


PROMISES = (acts, zero_is_nothing, stored_is_float, copies, undone_from_the_last, undone_from_the_first)


UNDONE = (undone_from_the_last, undone_from_the_first)


def check(family: Family, names: Sequence[str], promises: Sequence[Callable[..., None]] = PROMISES) -> None:
    """What parts promise together, in this order of applying.

    Raises:
        AssertionError: a promise is broken; it says which.
    """
    for promise in promises:
        promise(family, [family.parts[name] for name in names])


def undo(family: Family, parts: Sequence[Part], *, backwards: bool) -> None:
    """Take all parts back one by one; after each the model is that of the parts that are left, bit for bit."""
    stack = Stack(family, parts)
    now = output(family, parts)
    while edits := [i for i, part in enumerate(stack.parts) if part.kind == "edit"]:
        stack.remove(edits[-1 if backwards else 0])
        left = [part.name for part in stack.parts]
        before, now = now, stack.run()
        assert not torch.equal(now, before), f"undone to {left}: nothing changed"
        assert torch.equal(now, output(family, stack.parts)), f"undone to {left}: other outputs"
    found, fresh = stack.model.state_dict(), state(family, stack.parts)
    assert found.keys() == fresh.keys(), "the state_dict has other names after undoing"
    assert all(torch.equal(found[name], value) for name, value in fresh.items()), "weights differ after undoing"

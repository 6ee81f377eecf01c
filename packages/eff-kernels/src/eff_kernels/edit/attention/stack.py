"""The rules of one attention module and how a call goes through them.

A stack hangs on its module. It holds what was set up and nothing of a call, so that threads do not meet in it; copies
and pickles of the module carry their own, without observers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eff_kernels.edit.attention.call import AttentionCall, AttentionOutput, EditBlock
from eff_kernels.edit.attention.explicit import attend_explicit
from eff_kernels.edit.attention.measure import Heads

Host = Callable[[AttentionCall], AttentionOutput]
Rule = Callable[[AttentionCall, "Attend"], "AttentionOutput | Tensor"]
Record = Callable[[AttentionCall, AttentionOutput], object]

ATTRIBUTE = "_eff_attention"


@dataclass(frozen=True, eq=False)
class Entry:
    """One rule on one module.

    Attributes:
        rule: An editor ``rule(call, attend)``, or an observer ``record(call, output)``.
        observes: Whether it is an observer.
        order: Place in the stack, low is outside; None: observers outside of all, the only editor inside.
        needs: What it asks for: "weights", "lse", "roles".
        grad: Whether an observer may build a graph.
    """

    rule: Any
    observes: bool = False
    order: float | None = None
    needs: frozenset[str] = frozenset()
    grad: bool = False

    @property
    def place(self) -> tuple[int, float]:
        """Key to sort by."""
        return (1, self.order) if self.order is not None else (0 if self.observes else 2, 0.0)


class Stack:
    """Rules of one module, from outside in."""

    def __init__(self, name: str, layer: int | None) -> None:
        self.name, self.layer = name, layer
        self.entries: tuple[Entry, ...] = ()
        self.host: Any = None
        self.is_cross = False

    def add(self, entry: Entry) -> None:
        """Put a rule in.

        Raises:
            ValueError: two editors would have no order, or the same.
        """
        editors = [e for e in (*self.entries, entry) if not e.observes]
        if not entry.observes and len(editors) > 1:
            orders = [e.order for e in editors]
            if None in orders or len(set(orders)) < len(orders):
                raise ValueError(
                    f"{self.name} has {len(editors)} rules that change its attention, with order {orders}; give each "
                    "its own order= (the lowest sees the host's call first and its result last)"
                )
        self.entries = tuple(sorted((*self.entries, entry), key=lambda e: e.place))

    def discard(self, entry: Entry) -> None:
        """Take a rule out, if it is in."""
        self.entries = tuple(e for e in self.entries if e is not entry)

    def run(self, call: AttentionCall, host: Host) -> AttentionOutput:
        """Send a call through all rules."""
        return Attend(self.entries, 0, host)(call)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entries": tuple(e for e in self.entries if not e.observes)}


class Attend:
    """What a rule calls to have the call answered: by the next rule inside, at last by the host's own attention."""

    def __init__(self, entries: tuple[Entry, ...], level: int, host: Host) -> None:
        self._entries, self._level, self._host = entries, level, host
        self._used = False

    @property
    def alone(self) -> bool:
        """Whether the rule that holds this is the only one, so that no other rule sees the call."""
        return len(self._entries) == 1

    @property
    def inside(self) -> bool:
        """Whether another rule that changes attention stands inside, which only this call reaches."""
        return any(not entry.observes for entry in self._entries[self._level :])

    def __call__(self, call: AttentionCall) -> AttentionOutput:
        """Answer a call, changed or not."""
        self._used = True
        if self._level == len(self._entries):
            return _innermost(call, self._host, self._entries)
        entry = self._entries[self._level]
        inner = Attend(self._entries, self._level + 1, self._host)
        if entry.observes:
            return _observe(entry, call, inner(call))
        result = entry.rule(call, inner)
        if call.edits and not inner._used:
            raise RuntimeError(f"{call.name}: {entry.rule!r} computes no weights, but an outer rule changes them")
        return _output(call, entry, result)

    def with_lse(self, call: AttentionCall) -> AttentionOutput:
        """Answer a call, with the log-sum-exp of its logits where the host's kernel has it anyhow; see `alone`."""
        return self(call.replace(wants_lse=True))

    def with_weights(
        self, call: AttentionCall, edit: EditBlock, *, heads: Heads = None, rows: slice | None = None
    ) -> AttentionOutput:
        """Answer a call with the weights of some heads changed after the softmax, see `Edit.weights`."""
        return self(call.edited(weights=edit, heads=heads, rows=rows))

    def with_logits(
        self, call: AttentionCall, edit: EditBlock, *, heads: Heads = None, rows: slice | None = None
    ) -> AttentionOutput:
        """Answer a call with the logits of some heads changed before the softmax, see `Edit.logits`."""
        return self(call.edited(logits=edit, heads=heads, rows=rows))


def stack_of(module: nn.Module) -> Stack | None:
    """The stack of a module, if it has one."""
    return module.__dict__.get(ATTRIBUTE)


def _observe(entry: Entry, call: AttentionCall, output: AttentionOutput) -> AttentionOutput:
    if entry.grad:
        entry.rule(call, output)
    elif not call.recomputed:
        with torch.no_grad():
            entry.rule(call, output)
    return output


def _innermost(call: AttentionCall, host: Host, entries: tuple[Entry, ...]) -> AttentionOutput:
    """The host's attention, and where there are edits the explicit one for the heads and rows they are for."""
    output = _edited(call, host) if call.edits else host(call)
    weights = output.weights is None and any("weights" in e.needs for e in entries)
    lse = output.lse is None and any("lse" in e.needs for e in entries)
    if weights or lse:
        extra = attend_explicit(call, weights=weights, lse=lse)
        output = AttentionOutput(
            output.out, extra.weights if weights else output.weights, extra.lse if lse else output.lse
        )
    return output


def _edited(call: AttentionCall, host: Host) -> AttentionOutput:
    whole = any(e.heads is None for e in call.edits)
    heads = None if whole else tuple(sorted({h for e in call.edits for h in e.heads or ()}))
    rows = _hull(call)
    if heads is None and rows == slice(0, call.num_queries):
        return attend_explicit(call, weights=call.wants_weights)
    base = host(call.replace(edits=(), wants_lse=False))
    if heads == () or rows.start >= rows.stop:
        return base
    part = attend_explicit(call, heads=heads, rows=rows, weights=base.weights is not None)
    at = slice(None) if heads is None else list(heads)
    return base.replace(
        out=_put(base.out, at, rows, part.out),
        weights=None if base.weights is None or part.weights is None else _put(base.weights, at, rows, part.weights),
    )


def _hull(call: AttentionCall) -> slice:
    """Smallest range of queries that holds those of all edits."""
    ranges = [range(call.num_queries)[slice(None) if e.rows is None else e.rows] for e in call.edits]
    return slice(min(r.start for r in ranges), max(r.stop for r in ranges))


def _put(whole: Tensor, heads: Any, rows: slice, part: Tensor) -> Tensor:
    out = whole.clone()
    out[:, heads, rows] = part.to(whole.dtype)
    return out


def _output(call: AttentionCall, entry: Entry, result: AttentionOutput | Tensor) -> AttentionOutput:
    output = AttentionOutput(result) if isinstance(result, Tensor) else result
    if not isinstance(output, AttentionOutput):
        raise TypeError(
            f"{call.name}: {entry.rule!r} must return a tensor or AttentionOutput, not {type(result).__name__}"
        )
    want = (max(call.q.shape[0], call.k.shape[0]), *call.q.shape[1:3], call.v.shape[-1])
    if output.out.shape != want:
        raise ValueError(f"{call.name}: {entry.rule!r} returned {list(output.out.shape)}, wanted {list(want)}")
    if output.out.dtype not in (call.dtype, call.q.dtype, call.v.dtype):
        raise TypeError(f"{call.name}: {entry.rule!r} returned {output.out.dtype}, wanted {call.dtype}")
    return output

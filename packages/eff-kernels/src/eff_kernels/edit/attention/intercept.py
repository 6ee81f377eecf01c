"""Put a rule into the attention of a model, or look at it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from eff_kernels.edit.attention import diffusers, sdpa, transformers
from eff_kernels.edit.attention.call import AttentionCall, AttentionOutput
from eff_kernels.edit.attention.follow import decoder_of, follow
from eff_kernels.edit.attention.stack import ATTRIBUTE, Entry, Record, Rule, Stack, stack_of
from eff_kernels.edit.compiled import uncompiled
from eff_kernels.edit.handle import Handle
from eff_kernels.edit.report import Report
from eff_kernels.edit.select import Where, fits

_NEEDS = frozenset({"weights", "lse", "roles"})


class Found(NamedTuple):
    """An attention module of a model.

    Attributes:
        name: Dotted name.
        module: The module.
        way: How it is reached: "transformers" (AttentionInterface), "sdpa", or "" for not at all.
        reason: Why it cannot be reached.
    """

    name: str
    module: nn.Module
    way: str
    reason: str = ""


def intercept_attention(
    model: nn.Module,
    rule: Rule,
    *,
    where: Where | None = None,
    needs: Iterable[str] = (),
    order: float | None = None,
    strict: bool = False,
) -> Handle:
    """Let a rule answer the attention of a model.

    ``rule(call, attend)`` gets an `AttentionCall` and returns an `AttentionOutput` or a tensor [B, H, Sq, Dv].
    ``attend(call)`` runs the host's own attention on the call, changed or not; ``attend.with_weights(call, edit)`` and
    ``attend.with_logits(call, edit)`` do so with weights or logits changed. A rule that returns ``attend(call)``
    leaves the model bit-identical. A rule may be any callable; it is copied and pickled with the model, and it must
    keep what belongs to one call out of itself if the model is to run in several threads.

    Args:
        model: Any module: of transformers, diffusers, timm, or one's own.
        rule: The rule.
        where: Pattern, patterns or predicate of module names (`eff_kernels.edit.fits`), see `find_attention`; by
            default all attention that can be reached.
        needs: "weights" and "lse" have `AttentionOutput` carry them always; "roles" has the calls of decoders in
            transformers carry `TokenRoles`.
        order: Place among several rules on one module: the lowest sees the host's call first and its result last.
        strict: Whether a module that was left out is an error.

    Returns:
        A handle whose ``report`` lists the modules taken and left out. Handles may be removed in any order.

    Raises:
        ValueError: no module was taken, a need is unknown, or two rules on one module have no order.
        SkippedModulesError: with ``strict``, a module was left out.
    """
    entry = Entry(rule, order=order, needs=_checked(needs))
    return _put(model, entry, where, strict, "intercept_attention")


def observe_attention(
    model: nn.Module,
    record: Record,
    *,
    where: Where | None = None,
    needs: Iterable[str] = (),
    order: float | None = None,
    grad: bool = False,
    own_thread: bool = False,
    strict: bool = False,
) -> Handle:
    """Have ``record(call, output)`` called after each attention; what it returns is not looked at.

    An observer stays with the model it was put into: copies and pickles are without. By default it sees the host's
    call and what all rules together made of it, runs without gradients, and is left out when gradient checkpointing
    computes a forward again.

    Args:
        model: Any module.
        record: The observer.
        where: As in `intercept_attention`.
        needs: As in `intercept_attention`.
        order: Place among rules, to see what one in the middle sees.
        grad: Whether it may build a graph on what it sees. It is then called in recomputations too
            (``call.recomputed``). Under reentrant checkpointing nothing that it keeps has a graph.
        own_thread: Whether it sees only what the thread that puts it in runs, and not what others run through the same
            model meanwhile. Recomputations, which autograd runs in threads of its own, are seen either way.
        strict: As in `intercept_attention`.

    Returns:
        A handle with a report.

    Raises:
        ValueError: no module was taken, or a need is unknown.
        SkippedModulesError: with ``strict``, a module was left out.
    """
    if own_thread:
        record = _of_this_thread(record)
    entry = Entry(record, observes=True, order=order, needs=_checked(needs), grad=grad)
    return _put(model, entry, where, strict, "observe_attention")


def find_attention(model: nn.Module, where: Where | None = None) -> list[Found]:
    """The attention modules of a model in its order, each with the way to reach it or the reason why there is none.

    Without ``where`` these are the modules that go through transformers' interface, those of diffusers, and otherwise
    those whose class is called "...Attention" and that hold no other one. With ``where`` they are those of them that
    fit, and modules that it names without wildcards; if there is none, all modules that fit. These are taken even if
    nothing shows that they call ``scaled_dot_product_attention``, and raise when they run if they do not.
    """
    named = list(model.named_modules())
    known = {m for _, m in named if _certain(m)}
    known = {m for m in known if not any(c in known for c in m.modules() if c is not m)}
    # What a rule has put inside of an attention, such as sparse-linear's, is no attention of the model.
    parts = {c for m in known for c in m.modules() if c is not m}
    called = {m for _, m in named if _called_attention(m) and m not in parts}
    chosen = known | {m for m in called if not any(c in known for c in m.modules())}
    chosen = {m for m in chosen if not any(c in chosen for c in m.modules() if c is not m)}
    if where is None:
        return [_found(n, m, named=False) for n, m in named if m in chosen]
    fitting = [(n, m) for n, m in named if fits(where, n, m)]
    exact = {m for n, m in fitting if _by_name(where, n)}
    some = [(n, m) for n, m in fitting if m in chosen or m in exact] or fitting
    return [_found(n, m, named=True) for n, m in some]


def _of_this_thread(record: Record) -> Record:
    thread = threading.get_ident()

    def look(call: AttentionCall, output: AttentionOutput) -> None:
        if call.recomputed or threading.get_ident() == thread:
            record(call, output)

    return lambda call, output: uncompiled(look)(call, output)


def _by_name(where: Where, name: str) -> bool:
    """Whether a pattern without wildcards names a module."""
    patterns = () if callable(where) else [where] if isinstance(where, str) else where
    return any(name == p or name.endswith("." + p) for p in patterns)


def decoder_attention(model: nn.Module) -> list[str]:
    """Names of the self-attention modules of a model's language decoder, in the order of its layers.

    Vision towers, encoders and cross-attention are left out.
    """
    modules = dict(model.named_modules())
    found = [f for f in find_attention(model) if f.way and decoder_of(modules, f.name) is not None]
    return [f.name for f in found if not diffusers.named_cross(f.module, f.name)]


def _certain(module: nn.Module) -> bool:
    """Whether a module is attention whatever it is called: by how it computes, or as it has rules already."""
    computes = transformers.goes_through_interface(module) or diffusers.is_diffusers_attention(module)
    return computes or stack_of(module) is not None


def _called_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _found(name: str, module: Any, *, named: bool) -> Found:
    kind: Any = type(module)
    if transformers.goes_through_interface(module):
        try:
            transformers.Host(kind).function(module.config._attn_implementation_internal)
        except ValueError as error:
            return Found(name, module, "", str(error))
        return Found(name, module, "transformers")
    if isinstance(module, nn.MultiheadAttention):
        return Found(name, module, "", "torch.nn.MultiheadAttention computes inside PyTorch, where no rule can reach")
    if named or diffusers.is_diffusers_attention(module) or sdpa.mentions(kind):
        return Found(name, module, "sdpa")
    return Found(name, module, "", f"{kind.__name__} calls neither AttentionInterface nor scaled_dot_product_attention")


def _put(model: nn.Module, entry: Entry, where: Where | None, strict: bool, action: str) -> Handle:
    handle = Handle(Report(action))
    names = dict(model.named_modules())
    try:
        for name, module, way, reason in find_attention(model, where):
            if not way:
                handle.report.skip(name, reason)
                continue
            _enter(handle, names, name, module, way, entry)
            handle.report.change(name)
        if not handle.report.changed:
            raise ValueError(f"no attention was found to intercept\n{handle.report}")
        if strict:
            handle.report.raise_if_skipped()
        if "roles" in entry.needs:
            follow(model, [e.name for e in handle.report.changed], handle)
    except Exception:
        handle.remove()
        raise
    return handle


def _enter(handle: Handle, names: dict[str, nn.Module], name: str, module: nn.Module, way: str, entry: Entry) -> None:
    stack = stack_of(module)
    if stack is None:
        stack = Stack(name, _layer(name, module))
        stack.add(entry)
        (transformers if way == "transformers" else sdpa).attach(module, stack)
        setattr(module, ATTRIBUTE, stack)
        if (block := diffusers.single_block(names, name)) is not None:
            block.forward = diffusers.SingleBlock(block)
    else:
        stack.add(entry)
    handle.on_remove(functools.partial(_leave, module, way, stack, entry, diffusers.single_block(names, name)))


def _leave(module: Any, way: str, stack: Stack, entry: Entry, block: Any) -> None:
    stack.discard(entry)
    if stack.entries or stack_of(module) is not stack:
        return
    (transformers if way == "transformers" else sdpa).detach(module)
    if block is not None:
        diffusers.SingleBlock.restore(block)
    delattr(module, ATTRIBUTE)


def _layer(name: str, module: nn.Module) -> int | None:
    if isinstance(index := getattr(module, "layer_idx", None), int):
        return index
    numbers = [int(p) for p in name.split(".") if p.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


def _checked(needs: Iterable[str]) -> frozenset[str]:
    given = frozenset([needs] if isinstance(needs, str) else needs)
    if given - _NEEDS:
        raise ValueError(f"needs may hold {sorted(_NEEDS)}, got {sorted(given - _NEEDS)}")
    return given

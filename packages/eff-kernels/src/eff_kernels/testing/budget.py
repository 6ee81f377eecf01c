"""Error budgets: how far from the float64 result a kernel may be, derived from the data and never typed in.

A kernel is right when its error against the result in float64 is at most ``factor`` times the error that the plain
PyTorch reference makes in the same low precision, plus one rounding of the output's dtype:

    error(kernel) <= factor * (error(eager reference) + rounding)

This holds for the largest error and for the root mean square relative to that of the result, so that neither one wrong
value nor a small bias in all of them passes. Integers must be equal to those of the reference.

The errors of a handful of values say little about how large they can get: one of them may be right to the last bit by
chance. Below 64 values the budget is therefore wider, by 8 / sqrt(number of values).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def to_float64(tree: Any) -> Any:
    """Cast each floating tensor, and each floating ``torch.dtype``, to float64 in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        return tree.detach().double() if tree.is_floating_point() else tree.detach()
    if isinstance(tree, torch.dtype):
        return torch.float64 if tree.is_floating_point else tree
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(to_float64(item) for item in tree))
    if isinstance(tree, tuple | list):
        return type(tree)(to_float64(item) for item in tree)
    if isinstance(tree, dict):
        return {key: to_float64(value) for key, value in tree.items()}
    return tree


def compare(
    actual: Tensor, eager: Tensor, truth: Tensor, *, factor: float = 2.0, name: str = "output", integer_steps: int = 0
) -> str | None:
    """Hold one tensor against its budget.

    Args:
        actual: What the kernel computed.
        eager: What the reference computed from the same inputs in the same dtypes; its shape and dtype are required.
        truth: What the reference computed in float64.
        factor: How many times the error of the eager reference and one rounding is allowed.
        name: For the message.
        integer_steps: For integer outputs, the difference to ``eager`` that is allowed.

    Returns:
        None if the tensor keeps to its budget, else what is wrong with the numbers.
    """
    if actual.shape != eager.shape:
        return f"{name}: shape {list(actual.shape)}, wanted {list(eager.shape)}"
    if actual.dtype != eager.dtype:
        return f"{name}: dtype {actual.dtype}, wanted {eager.dtype}"
    if eager.numel() == 0:
        return None
    actual, eager, truth = (t.detach().cpu() for t in (actual, eager, truth))
    if not eager.dtype.is_floating_point:
        return _compare_integers(actual, eager, integer_steps, name)
    wrong = _compare_non_finite(actual, eager, truth, name)
    if wrong is not None:
        return wrong
    finite = torch.isfinite(eager) & torch.isfinite(truth) & torch.isfinite(actual)
    if not finite.any():
        return None
    exact = truth[finite].double()
    error = (actual[finite].double() - exact).abs()
    eager_error = (eager[finite].double() - exact).abs()
    info = torch.finfo(eager.dtype)
    band = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps
    problems = []
    factor *= max(1.0, 8 / math.sqrt(int(finite.sum())))
    limit = factor * (float(eager_error.max()) + float(band.max()))
    if float(error.max()) > limit:
        index = [int(i) for i in finite.nonzero()[error.argmax()]]
        problems.append(
            f"largest error {float(error.max()):.3e} is above {limit:.3e} at {index}: "
            f"got {float(actual[tuple(index)]):.9g}, float64 {float(truth[tuple(index)]):.9g}, "
            f"eager {float(eager[tuple(index)]):.9g}"
        )
    scale = max(_rms(exact), info.smallest_normal)
    rms, rms_limit = _rms(error) / scale, factor * (_rms(eager_error) + _rms(band)) / scale
    if rms > rms_limit:
        problems.append(f"relative RMS error {rms:.3e} is above {rms_limit:.3e}")
    if not problems:
        return None
    return (
        f"{name} ({eager.dtype}, {list(eager.shape)}) is over its error budget of {factor:g} x (eager error "
        f"{float(eager_error.max()):.3e} + rounding {float(band.max()):.3e}):\n  " + "\n  ".join(problems)
    )


def within_budget(actual: Any, eager: Any, truth: Any, *, factor: float = 2.0, integer_steps: int = 0) -> list[str]:
    """`compare` for a tensor, or for each tensor of a tuple or list; an empty list means that all is well."""
    tensors = [_flatten(tree) for tree in (actual, eager, truth)]
    if len({len(flat) for flat in tensors}) > 1:
        return [f"{len(tensors[0])} outputs, the reference gives {len(tensors[1])}, in float64 {len(tensors[2])}"]
    found = (
        compare(a, e, t, factor=factor, name=name, integer_steps=integer_steps)
        for (name, a), (_, e), (_, t) in zip(*tensors, strict=True)
    )
    return [text for text in found if text is not None]


def assert_within_budget(
    actual: Any,
    reference_fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    factor: float = 2.0,
    integer_steps: int = 0,
) -> None:
    """Assert that ``actual`` is as near to the float64 result as the budget asks.

    Args:
        actual: Tensor, or tuple of tensors, that a kernel computed from ``args``.
        reference_fn: The reference. It runs twice: on ``args`` as they are, and on `to_float64` of them; so it must
            compute in float64 when its inputs are float64.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        factor: How many times the eager reference's error and one rounding is allowed.
        integer_steps: For integer outputs, the difference that is allowed.

    Raises:
        AssertionError: with the numbers of each output that is over budget.
    """
    kwargs = dict(kwargs or {})
    with torch.no_grad():
        eager = reference_fn(*args, **kwargs)
        truth = reference_fn(*to_float64(tuple(args)), **to_float64(kwargs))
    problems = within_budget(actual, eager, truth, factor=factor, integer_steps=integer_steps)
    if problems:
        raise AssertionError("\n".join(problems))


def _flatten(tree: Any) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        return [("output", tree)]
    if tree is None:
        return []
    names = getattr(tree, "_fields", None) or [f"output {i}" for i in range(len(tree))]
    return [(str(name), item) for name, item in zip(names, tree, strict=True) if item is not None]


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.square().mean()))


def _compare_integers(actual: Tensor, eager: Tensor, steps: int, name: str) -> str | None:
    difference = (actual.long() - eager.long()).abs()
    if int(difference.max()) <= steps:
        return None
    count = int((difference > steps).sum())
    index = [int(i) for i in (difference > steps).nonzero()[0]]
    return (
        f"{name} ({eager.dtype}, {list(eager.shape)}): {count} of {eager.numel()} values differ by more "
        f"than {steps}, the first at {index}: got {int(actual[tuple(index)])}, wanted {int(eager[tuple(index)])}"
    )


def _compare_non_finite(actual: Tensor, eager: Tensor, truth: Tensor, name: str) -> str | None:
    """NaN and infinities must be where the reference has them; next to the largest finite number both are right."""
    info = torch.finfo(eager.dtype)
    edge = torch.isfinite(truth) & (truth.abs() > info.max * (1 - 4 * info.eps))
    differs = (
        (torch.isnan(actual) != torch.isnan(eager))
        | (torch.isposinf(actual) != torch.isposinf(eager))
        | (torch.isneginf(actual) != torch.isneginf(eager))
    ) & ~edge
    if not differs.any():
        return None
    index = [int(i) for i in differs.nonzero()[0]]
    return (
        f"{name} ({eager.dtype}, {list(eager.shape)}): {int(differs.sum())} values differ from the reference in "
        f"being NaN or infinite, the first at {index}: got {float(actual[tuple(index)])}, "
        f"wanted {float(eager[tuple(index)])}"
    )

"""Putting a table of scales into a model: into weights that are there anyway, or as a multiplication at run time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from eff_kernels.edit import Handle, Report
from torch import Tensor, nn

from eff_quant.layer import QuantizedLinear
from eff_quant.quantvla.attention import AttentionParts, attention_parts
from eff_quant.quantvla.scales import ModuleScales, ScaleTable

# Marks an attention module that has been scaled; it travels with copies of the model.
MARK = "eff_scales_applied"
# Names of the scale of each output row, float32 with N elements, in quantised layers of this package.
_ROW_SCALES = ("scale", "SCB", "weight_scale")

Change = tuple[Tensor, Tensor]
"""A tensor and the values that it is to get."""


class ScaleHandle(Handle):
    """A `Handle` that restores the exact weights, with a report of what was scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.report = Report("apply_scale_table")


@torch.no_grad()
def apply_scale_table(model: nn.Module, table: ScaleTable, *, fold: bool = True) -> ScaleHandle:
    """Multiply the queries of each head by alpha and the output of each attention module by beta.

    Folded, alpha goes into the rows of the query projection (or into the norm behind it), beta into the output
    projection: no new operation at run time. Rotary embedding commutes with alpha. Float layers keep a copy of what was
    changed for `Handle.remove`; of quantised layers only scales change.
    With ``fold=False`` hooks multiply at run time.

    Args:
        model: The quantised model.
        table: From `calibrate_scales`.
        fold: Whether to change weights.

    Returns:
        A handle: ``remove()`` restores the weights bit for bit, ``report`` lists the modules; those whose factors are
        all 1 are left.

    Raises:
        ValueError: a module is missing, has other heads, was scaled before, or cannot be folded (a norm shared by heads
            of different alpha; rotated output rows of a quantised query projection); nothing has been changed then.
    """
    modules = dict(model.named_modules())
    handle = ScaleHandle()
    plans: list[tuple[nn.Module, list[Change], list[Callable[[], Any]]]] = []
    for name, scales in table.modules.items():
        if name not in modules:
            raise ValueError(f"the table names {name!r}, and the model has no such module")
        module = modules[name]
        if hasattr(module, MARK):
            raise ValueError(f"{name}: scales have been applied already; remove() them before applying others")
        parts = attention_parts(name, module)
        _check_heads(name, parts, scales)
        if set(scales.alpha) == {1.0} and scales.beta == 1.0:
            handle.report.skip(name, "all factors are 1")
            continue
        changes: list[Change] = []
        hooks: list[Callable[[], Any]] = []
        if fold:
            changes = _folded(name, parts, scales)
        else:
            hooks = _hooks(parts, scales)
        plans.append((module, changes, hooks))
        handle.report.change(name)
    for module, changes, hooks in plans:
        _do(handle, module, changes, hooks)
    return handle


def _do(handle: Handle, module: nn.Module, changes: list[Change], hooks: list[Callable[[], Any]]) -> None:
    for tensor, new in changes:
        handle.on_remove(partial(_set, tensor, tensor.detach().clone()))
        _set(tensor, new)
    for register in hooks:
        handle.on_remove(register().remove)
    setattr(module, MARK, True)
    handle.on_remove(lambda: delattr(module, MARK))


def _set(tensor: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(value)


def _check_heads(name: str, parts: AttentionParts, scales: ModuleScales) -> None:
    heads = len(scales.alpha)
    if parts.heads is not None and parts.heads != heads:
        raise ValueError(f"{name}: the table has {heads} heads, the module {parts.heads}")
    for query, _ in parts.queries:
        rows = _rows(name, query)
        if rows % heads:
            raise ValueError(f"{name}: the table has {heads} heads, which do not divide the {rows} rows of the queries")


def _rows(name: str, layer: nn.Module) -> int:
    rows = getattr(layer, "out_features", None)
    if not isinstance(rows, int):
        raise ValueError(f"{name}: cannot scale a {type(layer).__name__}; wanted a linear layer")
    return rows


def _folded(name: str, parts: AttentionParts, scales: ModuleScales) -> list[Change]:
    changes: list[Change] = []
    if set(scales.alpha) != {1.0}:
        for query, norm in parts.queries:
            factors = _per_row(scales.alpha, _rows(name, query))
            changes += _scaled_rows(name, query, factors) if norm is None else _scaled_norm(name, norm, factors, scales)
    if scales.beta != 1.0:
        changes += _scaled_rows(name, parts.out, torch.full((_rows(name, parts.out),), scales.beta))
    return changes


def _per_row(alpha: tuple[float, ...], rows: int) -> Tensor:
    return torch.tensor(alpha).repeat_interleave(rows // len(alpha))


def _scaled_rows(name: str, layer: Any, factors: Tensor) -> list[Change]:
    """Multiply the outputs of a linear layer, float or quantised."""
    weight = None if isinstance(layer, QuantizedLinear) else getattr(layer, "weight", None)
    shape: tuple[int, ...]
    if isinstance(weight, Tensor) and weight.is_floating_point():
        target, shape = weight, (-1, 1)
    else:
        found = (getattr(layer, n, None) for n in _ROW_SCALES)
        rows = [t for t in found if isinstance(t, Tensor) and t.dtype == torch.float32 and t.numel() == len(factors)]
        if not rows:
            raise ValueError(f"{name}: a {type(layer).__name__} has no scale for each output row; use fold=False")
        rotation = getattr(layer, "rotation_out", None)
        if rotation is not None and not _constant_in_blocks(factors, rotation.shape[-1]):
            raise ValueError(
                f"{name}: its query projection has rotated output rows that mix heads of different alpha; "
                "quantise it with row_rotation=False, or use fold=False"
            )
        target, shape = rows[0], tuple(-1 if i == 0 else 1 for i in range(rows[0].ndim))
    changes = [(target, _times(target, factors.view(shape)))]
    if layer.bias is not None:
        changes.append((layer.bias, _times(layer.bias, factors)))
    return changes


def _times(tensor: Tensor, factors: Tensor) -> Tensor:
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.detach().to(wide) * factors.to(tensor.device, wide)).to(tensor.dtype)


def _constant_in_blocks(factors: Tensor, block: int) -> bool:
    return all(len(part.unique()) == 1 for part in factors.split(block))


def _scaled_norm(name: str, norm: Any, factors: Tensor, scales: ModuleScales) -> list[Change]:
    """Multiply what a query norm returns: its weight (and bias) has an entry for each row, or for each of a head."""
    weight = getattr(norm, "weight", None)
    what = f"{name}: its queries are normalised by a {type(norm).__name__}"
    if not isinstance(weight, Tensor):
        raise ValueError(f"{what} without a weight to fold alpha into; use fold=False")
    if weight.numel() != len(factors):
        if weight.numel() * len(scales.alpha) != len(factors) or len(set(scales.alpha)) > 1:
            raise ValueError(f"{what} that all heads share, and alpha differs between them; use fold=False")
        factors = factors[: weight.numel()]
    bias = getattr(norm, "bias", None)
    changes = [(t, _times(t, factors)) for t in (weight, bias) if isinstance(t, Tensor)]
    if not _is_proportional(norm):
        raise ValueError(f"{what} whose output is not proportional to its weight; use fold=False")
    return changes


def _is_proportional(norm: Any) -> bool:
    """Whether doubling weight and bias doubles the output (it does not where 1 + weight is used, as in Gemma)."""
    tensors = [t for t in (norm.weight, getattr(norm, "bias", None)) if isinstance(t, Tensor)]
    old = [t.detach().clone() for t in tensors]
    probe = torch.linspace(-1, 2, norm.weight.numel(), device=norm.weight.device, dtype=norm.weight.dtype)
    try:
        for t in tensors:
            _set(t, torch.ones_like(t))
        once = norm(probe[None, None])
        for t in tensors:
            _set(t, torch.full_like(t, 2.0))
        return torch.equal(norm(probe[None, None]), 2 * once)
    finally:
        for t, value in zip(tensors, old, strict=True):
            _set(t, value)


def _hooks(parts: AttentionParts, scales: ModuleScales) -> list[Callable[[], Any]]:
    hooks: list[Callable[[], Any]] = []
    if set(scales.alpha) != {1.0}:
        for query, norm in parts.queries:
            rows = query.out_features
            factors = _per_row(scales.alpha, rows)  # type: ignore[arg-type]
            hook = _times_heads(factors, scales, parts.head_axis)
            hooks.append(partial((query if norm is None else norm).register_forward_hook, hook))
    if scales.beta != 1.0:
        hooks.append(lambda: parts.out.register_forward_hook(lambda m, args, out: out * scales.beta))
    return hooks


def _times_heads(factors: Tensor, scales: ModuleScales, axis: int) -> Callable[..., Tensor]:
    """A hook that multiplies an output [..., N], or one with an axis of heads, by the factors of the heads."""

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        if out.shape[-1] == len(factors):
            return out * factors.to(out)
        heads = len(scales.alpha)
        if out.ndim < -axis or out.shape[axis] != heads:
            raise ValueError(f"queries of shape {list(out.shape)}, wanted {heads} heads at dimension {axis}")
        shape = [1] * out.ndim
        shape[axis] = heads
        return out * factors[:: len(factors) // heads].to(out).view(shape)

    return hook

"""Fit the projections of the linear branch in closed form, from a few batches and without training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from eff_kernels.edit import ModuleCall, calibrate
from torch import Tensor, nn

from eff_attention.autocast import alike
from eff_attention.sparse_linear.apply import NAME, sla_modules
from eff_attention.sparse_linear.modules import SparseLinearAttention


@dataclass(frozen=True, slots=True)
class SLAFit:
    """Error of one layer against dense attention, as ||error|| / ||dense|| over all calibration tokens.

    Attributes:
        name: Host module.
        sparse: Error of the sparse branch alone.
        fitted: Error with the projection.
        tokens: Number of head tokens that were seen.
    """

    name: str
    sparse: float
    fitted: float
    tokens: int


@torch.no_grad()
def calibrate_sla(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    ridge: float = 1e-4,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> list[SLAFit]:
    """Set every projection to the ridge regression from the linear branch to what the sparse branch misses.

    While it looks, each layer puts out dense attention, so that all layers see what they would in the dense model. Sums
    are kept in float64, one matrix [D + 1, D + 1] a layer, whatever the number of tokens.

    Args:
        model: With `apply_sla` applied.
        batches: Inputs; a mapping gives keyword arguments, a tuple or list positional ones, all else is one argument.
        ridge: Weight of ||W||^2, as a share of the mean of the diagonal of the normal equations.
        forward: ``forward(model, batch)`` for a model that is called otherwise.

    Returns:
        One entry a layer that ran sparse.

    Raises:
        ValueError: the model has no sparse-linear attention, or no layer of it ran sparse.
    """
    layers = dict(sla_modules(model))
    if not layers:
        raise ValueError("the model has no sparse-linear attention; apply_sla first")
    sums = {name: _Sums() for name in layers}
    look = {f"{name}.{NAME}".lstrip("."): functools.partial(_compare, s) for name, s in sums.items()}
    calibrate(model, batches, look, run=forward)
    found = [s.solve(name, layers[name], ridge) for name, s in sums.items() if s.tokens]
    if not found:
        raise ValueError("no layer ran sparse; are all batches shorter than min_tokens?")
    return found


def _compare(sums: _Sums, call: ModuleCall) -> Tensor | None:
    """Note what the sparse branch misses, and put out dense attention."""
    module, (q, k, v, *more) = call.module, call.args
    assert isinstance(module, SparseLinearAttention)
    if not module.is_sparse(k.size(2)):
        return None
    q, k, v = alike(q, k, v)
    scale = more[0] if more else call.kwargs.get("scale")
    dense = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.size(1) != k.size(1))
    sparse, linear, _ = module.branches(q, k, v, scale)
    sums.add(linear, dense - sparse, dense)
    return dense


class _Sums:
    """Normal equations of the regression from [linear, 1] to dense - sparse."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0
        self.missed = self.dense = 0.0
        self.tokens = 0

    def add(self, linear: Tensor, missed: Tensor, dense: Tensor) -> None:
        x = F.pad(linear.double().flatten(0, -2), (0, 1), value=1.0)
        y = missed.double().flatten(0, -2)
        self.gram, self.cross = self.gram + x.mT @ x, self.cross + x.mT @ y
        self.missed += y.square().sum().item()
        self.dense += dense.double().square().sum().item()
        self.tokens += len(y)

    def solve(self, name: str, module: SparseLinearAttention, ridge: float) -> SLAFit:
        assert isinstance(self.gram, Tensor)
        assert isinstance(self.cross, Tensor)
        penalty = torch.full((len(self.gram),), ridge * self.gram.diagonal().mean().item(), dtype=torch.float64)
        penalty[-1] = 0.0  # not on the bias
        solution = torch.linalg.lstsq(self.gram.cpu() + penalty.diag(), self.cross.cpu(), driver="gelsd").solution
        module.proj.weight.copy_(solution[:-1].mT)
        module.proj.bias.copy_(solution[-1])
        s, g, c = solution, self.gram.cpu(), self.cross.cpu()
        error = self.missed - 2 * (s * c).sum().item() + (s * (g @ s)).sum().item()
        size = self.dense or 1.0
        return SLAFit(name, (self.missed / size) ** 0.5, (max(error, 0.0) / size) ** 0.5, self.tokens)

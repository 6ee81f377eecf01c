"""Ridge regression in closed form, in float64: one eigendecomposition, then every penalty for little.

Minimises (1/n) ||F V - Y||^2 + lambda ||V||^2. With F = U S W^T the solution is W S / (S^2 + n lambda) U^T Y, whether U
comes from F F^T (dual, when there are fewer samples than features) or W from F^T F (primal).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Features(Protocol):
    """A matrix F [num_samples, num_features] in float64 that is computed a block at a time."""

    num_samples: int
    num_features: int

    def rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of samples with all features."""

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of features of all samples."""


@dataclass
class Spectrum:
    """The eigenvectors that a ridge path needs.

    Attributes:
        values: [k], eigenvalues s^2 of F F^T that are not zero.
        targets: [k, t], U^T Y.
        residual: ||Y - U U^T Y||^2, what no feature reaches.
        left: U, [n, k].
        right: W of the primal, [p, k]; None in the dual.
        dof: Directions of Y beside those of U and the intercept, over which a residual spreads.
        intercept: 1 if a constant was taken off, else 0.
    """

    values: Tensor
    targets: Tensor
    residual: Tensor
    left: Tensor
    right: Tensor | None
    dof: int
    intercept: int

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.left)

    def shrink(self, alpha: float) -> Tensor:
        """N lambda / (s^2 + n lambda), the share of each direction that stays in the residual, [k]."""
        penalty = self.num_samples * alpha
        return penalty / (self.values + penalty)

    def gcv(self, alpha: float) -> float:
        """Generalised cross-validation, (RSS / n) / (trace(I - H) / n)^2, the intercept counted in H."""
        kept = self.shrink(alpha)
        rss = (kept[:, None] * self.targets).square().sum() + self.residual
        spread = (kept.sum() + self.dof) / self.num_samples
        return float(rss / self.num_samples / spread**2)

    def loo(self, alpha: float, y: Tensor) -> float:
        """Mean square of the leave-one-out errors r_i / (1 - h_ii), over samples and targets; y is centred."""
        kept = self.shrink(alpha)
        errors = self.left @ (kept[:, None] * self.targets)
        lever = self.left.square() @ kept
        if self.dof:
            errors = errors + (y - self.left @ self.targets)
            lever = lever + (1 - self.intercept / self.num_samples - self.left.square().sum(1))
        return float((errors / lever[:, None]).square().mean())


@dataclass
class RidgeFit:
    """Result of `fit_ridge`.

    Attributes:
        coef: [p, t].
        intercept: [t].
        alpha: The penalty lambda.
        path: (lambda, criterion) of each penalty tried; empty for a given one.
        dual: Dual coefficients [n, t], or None where the primal was solved.
        solver: "dual", "primal" or "cg".
    """

    coef: Tensor
    intercept: Tensor
    alpha: float
    path: list[tuple[float, float]]
    dual: Tensor | None
    solver: str


def decompose(gram: Tensor, y: Tensor, *, intercept: bool) -> Spectrum:
    """The spectrum of a dual problem from its (centred) Gram matrix F F^T [n, n] and (centred) targets [n, t]."""
    n = len(gram)
    if intercept:
        # A constant vector is an eigenvector of value 0 of a centred matrix; made the largest, it can be dropped.
        gram = gram + (2 * gram.trace() + 1) / n
    values, vectors = torch.linalg.eigh(gram)
    if intercept:
        values, vectors = values[:-1], vectors[:, :-1]
    values = values.clamp_min(0)
    return Spectrum(values, vectors.T @ y, y.new_zeros(()), vectors, None, 0, int(intercept))


def decompose_primal(features: Features, mean: Tensor, y: Tensor, *, intercept: bool) -> Spectrum:
    """The spectrum of a primal problem; reads all features twice."""
    n, p = features.num_samples, features.num_features
    moment = y.new_zeros(p, p)
    for _, block in features.rows():
        centred = block - mean
        moment.addmm_(centred.T, centred)
    values, right = torch.linalg.eigh(moment)
    reached = values > values[-1].clamp_min(0) * p * torch.finfo(values.dtype).eps
    values, right = values[reached], right[:, reached]
    left = y.new_empty(n, len(values))
    for rows, block in features.rows():
        left[rows] = (block - mean) @ right / values.sqrt()
    targets = left.T @ y
    residual = (y - left @ targets).square().sum()
    return Spectrum(values, targets, residual, left, right, n - int(intercept) - len(values), int(intercept))


def choose_alpha(
    spectrum: Spectrum, y: Tensor, alpha: float | str, alphas: Tensor | None
) -> tuple[float, list[tuple[float, float]]]:
    """The penalty and the path: a number as it is, "gcv" or "loo" the least value over ``alphas``.

    Without ``alphas`` the grid has 23 steps over 1e-9 to 100 times the mean eigenvalue of F F^T / n.
    """
    if not isinstance(alpha, str):
        return float(alpha), []
    if alphas is None:
        mean = (spectrum.values.sum() / spectrum.num_samples**2).clamp_min(torch.finfo(spectrum.values.dtype).tiny)
        alphas = mean * torch.logspace(-9, 2, 23, dtype=torch.float64)
    grid = [float(a) for a in alphas]
    path = [(a, spectrum.gcv(a) if alpha == "gcv" else spectrum.loo(a, y)) for a in grid]
    return min(path, key=lambda step: step[1])[0], path


def dual_coefficients(spectrum: Spectrum, alpha: float) -> Tensor:
    """(F F^T + n lambda)^-1 Y, [n, t]; for lambda = 0 the least-squares solution of least norm."""
    inverse = _inverse(spectrum.values, spectrum.num_samples * alpha)
    return spectrum.left @ (inverse[:, None] * spectrum.targets)


def _inverse(values: Tensor, penalty: float) -> Tensor:
    total = values + penalty
    small = values.max().clamp_min(0) * len(values) * torch.finfo(values.dtype).eps if penalty == 0 else 0.0
    return torch.where(total > small, 1 / total, 0.0)


def fit_ridge(
    features: Features, y: Tensor, *, alpha: float | str, alphas: Tensor | None, intercept: bool, solver: str = "auto"
) -> RidgeFit:
    """Fit all targets with one penalty.

    Args:
        features: F.
        y: [n, t] float64.
        alpha: lambda, "gcv" or "loo".
        alphas: Penalties to choose from, or None for the grid of `choose_alpha`.
        intercept: Whether a constant that is not penalised is fitted too.
        solver: "dual" for n <= p, "primal" for p < n, "cg" without either matrix; "auto" takes the smaller matrix, and
            conjugate gradients where both are above 16384.
    """
    n, p = features.num_samples, features.num_features
    if solver == "auto":
        solver = "cg" if min(n, p) > 16384 else "dual" if n <= p else "primal"
    if solver not in ("dual", "primal", "cg"):
        raise ValueError(f"solver={solver!r}; use 'auto', 'dual', 'primal' or 'cg'")
    offset = y.mean(0) if intercept else y.new_zeros(y.shape[1])
    centred = y - offset
    mean = y.new_zeros(p)
    if intercept:
        for rows, block in features.columns():
            mean[rows] = block.mean(0)
    path: list[tuple[float, float]] = []
    dual = None
    if solver == "cg":
        coef, alpha = _conjugate_gradients(features, mean, centred, alpha), float(alpha)
    elif solver == "dual":
        gram = y.new_zeros(n, n)
        for columns, block in features.columns():
            block = block - mean[columns]
            gram.addmm_(block, block.T)
        spectrum = decompose(gram, centred, intercept=intercept)
        alpha, path = choose_alpha(spectrum, centred, alpha, alphas)
        dual = dual_coefficients(spectrum, alpha)
        coef = y.new_empty(p, y.shape[1])
        for columns, block in features.columns():
            coef[columns] = (block - mean[columns]).T @ dual
    else:
        spectrum = decompose_primal(features, mean, centred, intercept=intercept)
        assert spectrum.right is not None
        alpha, path = choose_alpha(spectrum, centred, alpha, alphas)
        scale = spectrum.values.sqrt() * _inverse(spectrum.values, n * alpha)
        coef = spectrum.right @ (scale[:, None] * spectrum.targets)
    return RidgeFit(coef, offset - mean @ coef, alpha, path, dual, solver)


def _conjugate_gradients(features: Features, mean: Tensor, y: Tensor, alpha: float | str, tol: float = 1e-10) -> Tensor:
    """(F^T F + n lambda)^-1 F^T Y, a matrix of right sides at a time, F read once a step."""
    if isinstance(alpha, str):
        raise ValueError(
            f"alpha={alpha!r} needs all eigenvalues, too many for {features.num_samples} samples of "
            f"{features.num_features} features; pass a number for alpha, or use fewer heads"
        )
    penalty = features.num_samples * alpha

    def normal(v: Tensor) -> Tensor:
        total = penalty * v
        for _, block in features.rows():
            centred = block - mean
            total += centred.T @ (centred @ v)
        return total

    residual = y.new_zeros(features.num_features, y.shape[1])
    for rows, block in features.rows():
        residual += (block - mean).T @ y[rows]
    coef, direction = torch.zeros_like(residual), residual
    size = residual.square().sum(0)
    goal = tol**2 * size
    for _ in range(10 * features.num_features):
        if bool((size <= goal).all()):
            return coef
        image = normal(direction)
        step = torch.where(size > 0, size / (direction * image).sum(0), 0.0)
        coef, residual = coef + step * direction, residual - step * image
        new = residual.square().sum(0)
        direction = residual + torch.where(size > 0, new / size, 0.0) * direction
        size = new
    raise RuntimeError(f"conjugate gradients did not converge with alpha={alpha}; a larger penalty converges faster")

"""Targets that a layer of attention should learn, and the baseline that ignores that keys form a set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted

from eff_attention.random_features.base import check_alpha, read_alphas
from eff_attention.random_features.ridge import fit_ridge

Target = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def sample_sets(n: int, num_keys: int, dim: int, random: np.random.RandomState) -> NDArray[np.float64]:
    """Queries and keys uniform on the unit sphere, [n, num_keys + 1, dim]; the first token is the query."""
    x = random.standard_normal((n, num_keys + 1, dim))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _direction(dim: int) -> NDArray[np.float64]:
    """b, a fixed unit vector without a special axis."""
    b = np.arange(1.0, dim + 1) * np.where(np.arange(dim) % 2, -1, 1)
    return b / np.linalg.norm(b)


def _rotation(dim: int) -> NDArray[np.float64]:
    """S, a fixed rotation by a right angle in neighbouring pairs of axes after a cyclic shift of the axes."""
    s = np.roll(np.eye(dim), 1, axis=0)
    s[0] *= -1
    return s


def of_keys(degree: int) -> Target:
    """mean_i <b, x_i>^p, a function of the keys alone."""
    return lambda x: ((x[:, 1:] @ _direction(x.shape[-1])) ** degree).mean(1)


def of_query(degree: int) -> Target:
    """<b, x_0>^p, a function of the query alone."""
    return lambda x: (x[:, 0] @ _direction(x.shape[-1])) ** degree


def correlated(degree: int, *, rotated: bool = False) -> Target:
    """mean_i <x_0, S x_i>^p <b, x_i>, with S the identity or a fixed rotation."""

    def target(x: NDArray[np.float64]) -> NDArray[np.float64]:
        turn = _rotation(x.shape[-1]) if rotated else np.eye(x.shape[-1])
        scores = np.einsum("nd,nid->ni", x[:, 0], x[:, 1:] @ turn.T)
        return (scores**degree * (x[:, 1:] @ _direction(x.shape[-1]))).mean(1)

    return target


TARGETS: dict[str, Target] = {
    "mean <b,x>^2": of_keys(2),
    "mean <b,x>^4": of_keys(4),
    "<b,x0>^2": of_query(2),
    "<b,x0>^3": of_query(3),
    **{f"mean <x0,x>^{p} <b,x>": correlated(p) for p in (1, 2, 3, 4)},
    **{f"mean <x0,Sx>^{p} <b,x>": correlated(p, rotated=True) for p in (1, 2, 3, 4)},
}


class RandomFeatureMLPRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Ridge regression on ReLU random features of the whole sample as one vector: the baseline RFMLP of the paper.

    phi(X) = K^-1/2 relu(U vec(X) / |vec(X)|_rms) has K trained numbers, to be compared with M * D of attention.
    It sees the order of the keys and must learn from samples that it does not matter.
    """

    def __init__(
        self,
        n_features: int = 2048,
        *,
        alpha: float | str = "gcv",
        alphas: ArrayLike | None = None,
        fit_intercept: bool = True,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_features, self.alpha, self.alphas = n_features, alpha, alphas
        self.fit_intercept, self.random_state = fit_intercept, random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit to samples [n, ...] and targets [n] or [n, targets]."""
        check_alpha(self.alpha)
        flat = self._flat(X)
        self.n_features_in_ = flat.shape[1]
        self.scale_ = float(np.sqrt(np.square(flat).sum(1).mean())) or 1.0
        self.weights_ = check_random_state(self.random_state).standard_normal((flat.shape[1], self.n_features))
        targets = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        fitted = fit_ridge(
            *(_Matrix(torch.from_numpy(self.transform(X))), torch.from_numpy(targets.reshape(len(flat), -1))),
            alpha=self.alpha,
            alphas=read_alphas(self.alphas),
            intercept=self.fit_intercept,
        )
        self.coef_, self.intercept_, self.alpha_ = fitted.coef.numpy(), fitted.intercept.numpy(), fitted.alpha
        if targets.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[:, 0], self.intercept_[0]
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float64]:
        """phi(X), [n, n_features]."""
        check_is_fitted(self, "weights_")
        return np.maximum(self._flat(X) @ self.weights_ / self.scale_, 0) / np.sqrt(self.n_features)

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """[n], or [n, targets]."""
        return self.transform(X) @ self.coef_ + self.intercept_

    def _flat(self, X: Any) -> NDArray[np.float64]:
        samples = check_array(X, dtype=np.float64, allow_nd=True)
        return samples.reshape(len(samples), -1)


class _Matrix:
    """A matrix that is there already, as `ridge.Features`."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.num_samples, self.num_features = matrix.shape

    def rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        yield slice(None), self.matrix

    def columns(self) -> Iterator[tuple[slice, torch.Tensor]]:
        yield slice(None), self.matrix

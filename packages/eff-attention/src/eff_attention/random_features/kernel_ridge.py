"""Infinitely many random heads: kernel ridge regression with the closed-form kernel."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_array, check_is_fitted

from eff_attention.random_features.base import ScaledSets, check_alpha, read_alphas
from eff_attention.random_features.features import append_ones, attention_kernel
from eff_attention.random_features.inputs import QueryFrom, Sets, as_sets
from eff_attention.random_features.ridge import choose_alpha, decompose, dual_coefficients


class RFAKernelRidge(RegressorMixin, ScaledSets, BaseEstimator):  # type: ignore[misc]
    """Random-feature attention with M -> inf heads: ReLU, weights of mean 0, order-1 arc-cosine expectations.

    Samples, ``query``, ``normalize``, ``append_one``, ``alpha`` and ``alphas`` are those of
    `RandomFeatureAttentionRegressor`; ``query="self"`` has no closed form here. Costs O(n^2 N^2 d) for the kernel and
    O(n^3) for the fit. The fitted penalty is ``alpha_``, the dual coefficients ``dual_coef_``.
    """

    def __init__(
        self,
        *,
        weight_std: float = 0.5,
        append_one: bool = True,
        query: QueryFrom = "first",
        normalize: bool = True,
        alpha: float | str = "gcv",
        alphas: ArrayLike | None = None,
        fit_intercept: bool = True,
    ) -> None:
        self.weight_std, self.append_one, self.query, self.normalize = weight_std, append_one, query, normalize
        self.alpha, self.alphas, self.fit_intercept = alpha, alphas, fit_intercept

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Fit to targets ``y`` [n] or [n, targets]."""
        check_alpha(self.alpha)
        sets = self._read(X)
        targets = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if len(targets) != len(sets.keys):
            raise ValueError(f"X holds {len(sets.keys)} samples and y {len(targets)}")
        self._learn_scales(sets)
        self.n_features_in_ = self.key_dim_
        self.sets_ = self._scaled(sets)
        gram = torch.from_numpy(self._kernel(self.sets_))
        centred = torch.from_numpy(targets.reshape(len(targets), -1))
        if self.fit_intercept:
            self.gram_mean_ = gram.mean(0)
            gram = gram - self.gram_mean_ - gram.mean(1, keepdim=True) + gram.mean()
        offset = centred.mean(0) if self.fit_intercept else torch.zeros_like(centred[0])
        centred = centred - offset
        spectrum = decompose(gram, centred, intercept=self.fit_intercept)
        self.alpha_, path = choose_alpha(spectrum, centred, self.alpha, read_alphas(self.alphas))
        self.alpha_path_ = np.array(path).reshape(-1, 2)
        dual = dual_coefficients(spectrum, self.alpha_)
        if self.fit_intercept:
            # sum_i (k(x_i) - mean_j k(x_j)) a_i for centred a: the mean over j is a constant, taken off once.
            offset = offset - self.gram_mean_ @ dual
        self.dual_coef_, self.intercept_ = (
            dual.numpy().reshape(targets.shape),
            offset.numpy().reshape(targets.shape[1:]),
        )
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """[n], or [n, targets]."""
        check_is_fitted(self)
        sets = self._read(X)
        self._check_sizes(sets)
        return self._kernel(self._scaled(sets)) @ self.dual_coef_ + self.intercept_

    def _read(self, X: Any) -> Sets:
        if self.query == "self":
            raise ValueError("query='self' has no closed-form kernel here; use 'first', 'mean' or 'constant'")
        return as_sets(X, self.query, None)

    def _kernel(self, sets: Sets) -> NDArray[np.float64]:
        """Kernel of samples with those of the fit, [n, n_fit]."""
        query, keys, keep = self._tensors(sets)
        other_query, other_keys, other_keep = (query, keys, keep) if sets is self.sets_ else self._tensors(self.sets_)
        return attention_kernel(
            *(query, keys, other_query, other_keys), std=self.weight_std, keep=keep, other_keep=other_keep
        ).numpy()

    def _tensors(self, sets: Sets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        query, keys = torch.from_numpy(sets.query[:, 0]), torch.from_numpy(sets.keys)
        if self.append_one:
            query, keys = append_ones(query), append_ones(keys)
        return query, keys, None if sets.keep is None else torch.from_numpy(sets.keep)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array, tags.input_tags.two_d_array = True, False
        tags.target_tags.multi_output = True
        return tags

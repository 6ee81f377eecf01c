"""What the estimators share: parameters, checks, features in blocks, the fit."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from eff_attention.random_features.features import Activation, append_ones, attention_features, check_activation
from eff_attention.random_features.inputs import QueryFrom, Sets, as_sets, num_dimensions
from eff_attention.random_features.ridge import RidgeFit, fit_ridge
from eff_attention.random_features.sampling import HeadWeights, mean_weights, sample_heads

CACHE_BYTES = 1 << 30  # features up to this size are computed once and kept while fitting
BLOCK_BYTES = 1 << 26


class SetFeatures:
    """The features of some samples, computed in blocks; a small matrix is kept."""

    def __init__(self, sets: Sets, heads: HeadWeights, activation: Activation, append_one: bool, chunk: int) -> None:
        keys, query = torch.from_numpy(sets.keys), torch.from_numpy(sets.query)
        self.query, self.keys = (append_ones(query), append_ones(keys)) if append_one else (query, keys)
        self.keep = None if sets.keep is None else torch.from_numpy(sets.keep)
        self.pool = self.keep if sets.query.shape[1] > 1 else None  # padded tokens are no queries either
        self.heads, self.activation, self.chunk = heads, activation, chunk
        self.num_samples, self.dim = len(keys), heads.key_dim
        self.num_features = heads.num_heads * self.dim
        self._kept: torch.Tensor | None = None

    def block(self, rows: slice, heads: slice) -> torch.Tensor:
        """Phi of some samples and heads, the mean over queries, [rows, heads * D]."""
        part, keep = self.heads.heads(heads), None if self.keep is None else self.keep[rows]
        features = attention_features(
            *(self.query[rows], self.keys[rows], part),
            activation=self.activation,
            keep=None if keep is None else keep[:, None],
        )
        features = features * (part.num_heads / self.heads.num_heads) ** 0.5
        if self.pool is None:
            return features.mean(1).flatten(1)
        weights = self.pool[rows].double()
        return torch.einsum("nqmd,nq->nmd", features, weights / weights.sum(1, keepdim=True)).flatten(1)

    def rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of samples."""
        whole = self._whole()
        for start in range(0, self.num_samples, self.chunk):
            part = slice(start, start + self.chunk)
            yield part, self.block(part, slice(None)) if whole is None else whole[part]

    def columns(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Blocks of heads."""
        whole = self._whole()
        if whole is not None:
            yield slice(0, self.num_features), whole
            return
        step = max(1, BLOCK_BYTES // (8 * self.num_samples * self.dim))
        for start in range(0, self.heads.num_heads, step):
            heads = slice(start, min(start + step, self.heads.num_heads))
            samples = range(0, self.num_samples, self.chunk)
            block = torch.cat([self.block(slice(s, s + self.chunk), heads) for s in samples])
            yield slice(heads.start * self.dim, heads.stop * self.dim), block

    def _whole(self) -> torch.Tensor | None:
        if self._kept is None and 8 * self.num_samples * self.num_features <= CACHE_BYTES:
            step = self.chunk
            blocks = [self.block(slice(s, s + step), slice(None)) for s in range(0, self.num_samples, step)]
            self._kept = torch.cat(blocks)
        return self._kept


class ScaledSets:
    """Sizes and scales of the training set, and what they ask of other samples; for all estimators of sets."""

    normalize: bool

    def _learn_scales(self, sets: Sets) -> None:
        self.query_dim_, self.key_dim_ = sets.query.shape[-1], sets.keys.shape[-1]
        self.query_scale_, self.key_scale_ = (
            (rms(sets.query, None), rms(sets.keys, sets.keep)) if self.normalize else (1.0, 1.0)
        )

    def _check_sizes(self, sets: Sets) -> None:
        sizes, fitted = (sets.query.shape[-1], sets.keys.shape[-1]), (self.query_dim_, self.key_dim_)
        if sizes != fitted:
            raise ValueError(f"queries and keys have {sizes} features, the estimator was fitted with {fitted}")

    def _scaled(self, sets: Sets) -> Sets:
        return Sets(sets.query / self.query_scale_, sets.keys / self.key_scale_, sets.keep)


class RandomFeatureBase(ScaledSets, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """What the regressor and the classifier share: forms of samples, parameters, attributes.

    Samples ``X`` are one of
        - an array [n, tokens, d]: a query and keys, or keys alone (see ``query``);
        - a list of arrays [tokens_i, d], sets of different sizes;
        - a tuple (query [n, d], keys [n, N, d']) or (query, keys, mask [n, N]), True for keys that count;
        - an array [n, tokens * token_dim] when ``token_dim`` is given, as pipelines of scikit-learn need it.

    Args:
        n_heads: M. The model has M * D trained numbers, D = d' + 1.
        weight_mean: Mean of W_m: a number kappa for kappa diag(I_d, 0), "identity" for kappa = 1 (the biased model
            BRFA, better on targets made of <x_0, x_i>), or an array [D, D].
        weight_std: Standard deviation of the entries of W_m; 1/2 gives scores of variance 1.
        rank: r of W_m = Q_m^T K_m; None for dense matrices. Sizes above some 50 want a rank.
        activation: "relu" (the paper), "softmax" over the keys, or a function of a tensor of scores.
        append_one: Whether a one is appended to queries and keys. Without it one half of the degrees is out of reach.
        query: Where the query of an array comes from: "first" token, "mean" of the tokens, "self" (every token in
            turn, the results averaged), or "constant".
        normalize: Whether queries and keys are divided by the root of their mean squared norm in the training set.
        token_dim: Length of a token in samples of two dimensions.
        alpha: Penalty lambda of (1/n) |f - y|^2 + lambda |V|^2, or how it is chosen: "gcv" or "loo".
        alphas: The penalties to choose from; None for 23 steps over 1e-9 to 100 times the mean square of phi.
        fit_intercept: Whether a constant is fitted beside the features, without penalty.
        solver: "dual", "primal", "cg", or "auto" (see `ridge.fit_ridge`).
        chunk_size: Samples whose features are computed at a time.
        random_state: Seed of the heads.

    Attributes:
        coef_: [M * D], or [targets, M * D]: v_m after v_m, with ``transform(X) @ coef_.T + intercept_`` the prediction.
        intercept_: A number, or [targets].
        alpha_: The penalty used.
        alpha_path_: [steps, 2], penalties tried and their criterion.
        heads_: The frozen `HeadWeights`.
        dual_coef_: [n] or [n, targets] where the dual was solved, else None.
        query_scale_, key_scale_: What queries and keys are divided by.
    """

    def __init__(
        self,
        n_heads: int = 512,
        *,
        weight_mean: float | str | ArrayLike = 0.0,
        weight_std: float = 0.5,
        rank: int | None = None,
        activation: Activation = "relu",
        append_one: bool = True,
        query: QueryFrom = "first",
        normalize: bool = True,
        token_dim: int | None = None,
        alpha: float | str = "gcv",
        alphas: ArrayLike | None = None,
        fit_intercept: bool = True,
        solver: str = "auto",
        chunk_size: int = 256,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_heads, self.weight_mean, self.weight_std, self.rank = n_heads, weight_mean, weight_std, rank
        self.activation, self.append_one, self.query = activation, append_one, query
        self.normalize, self.token_dim, self.alpha, self.alphas = normalize, token_dim, alpha, alphas
        self.fit_intercept, self.solver, self.chunk_size = fit_intercept, solver, chunk_size
        self.random_state = random_state

    def transform(self, X: Any) -> NDArray[np.float64]:
        """The features phi(X), [n, M * D]: M^-1/2 mean_i sigma(x~_0^T W_m x~_i) x~_i, head after head."""
        check_is_fitted(self)
        features = self._features(self._scaled(self._read(X, reset=False)))
        return np.concatenate([block.numpy() for _, block in features.rows()])

    def _check(self) -> None:
        for name in ("n_heads", "chunk_size", "rank", "token_dim"):
            value = getattr(self, name)
            optional = value is None and name in ("rank", "token_dim")
            if optional or (isinstance(value, Integral) and int(value) >= 1):
                continue
            raise ValueError(f"{name}={value!r}; wanted an integer of at least 1")
        check_alpha(self.alpha)
        check_activation(self.activation)

    def _read(self, X: Any, *, reset: bool) -> Sets:
        """Samples as sets; remembers or compares the size of a token (of a row, for samples of 2 dimensions)."""
        flat = self.token_dim is not None and not isinstance(X, tuple) and num_dimensions(X) == 2
        if flat:
            X = validate_data(self, X, reset=reset, dtype=np.float64)
        sets = as_sets(X, self.query, self.token_dim)
        if reset:
            self._learn_scales(sets)
            if not flat:
                self.n_features_in_ = self.key_dim_
        else:
            self._check_sizes(sets)
        return sets

    def _features(self, sets: Sets) -> SetFeatures:
        return SetFeatures(sets, self.heads_, self.activation, self.append_one, int(self.chunk_size))

    def _fit(self, X: Any, y: NDArray[np.float64]) -> RidgeFit:
        """Draw the heads, fit the values for targets [n, t]."""
        features = self._prepare(X)
        if len(y) != features.num_samples:
            raise ValueError(f"X holds {features.num_samples} samples and y {len(y)}")
        fitted = fit_ridge(
            *(features, torch.from_numpy(y)),
            alpha=self.alpha if isinstance(self.alpha, str) else float(self.alpha),
            alphas=read_alphas(self.alphas),
            intercept=self.fit_intercept,
            solver=self.solver,
        )
        self.alpha_, self.solver_ = fitted.alpha, fitted.solver
        self.alpha_path_ = np.array(fitted.path).reshape(-1, 2)
        return fitted

    def _prepare(self, X: Any) -> SetFeatures:
        """Read the training samples, fix the scales and draw the heads."""
        self._check()
        sets = self._read(X, reset=True)
        one = int(self.append_one)
        mean = mean_weights(self.weight_mean, self.query_dim_ + one, self.key_dim_ + one, append_one=self.append_one)
        random = check_random_state(self.random_state)
        shape = (int(self.n_heads), self.query_dim_ + one, self.key_dim_ + one)
        self.heads_ = sample_heads(*shape, random, mean=mean, std=self.weight_std, rank=self.rank)
        return self._features(self._scaled(sets))

    def _decide(self, X: Any) -> NDArray[np.float64]:
        """Predictions of all targets, [n, t]."""
        check_is_fitted(self)
        features = self._features(self._scaled(self._read(X, reset=False)))
        coef = torch.from_numpy(np.atleast_2d(self.coef_)).T
        out = torch.cat([block @ coef for _, block in features.rows()]).numpy()
        return out + self.intercept_

    @property
    def _n_features_out(self) -> int:
        return self.heads_.num_heads * self.heads_.key_dim

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.two_d_array = self.token_dim is not None
        return tags


def rms(x: NDArray[np.float64], keep: NDArray[np.bool_] | None) -> float:
    """Root of the mean squared norm of the vectors that count; 1 where all are zero."""
    norms = np.square(x).sum(-1)
    size = float(np.sqrt(norms.mean() if keep is None else norms[keep].mean()))
    return size if size > 0 else 1.0


def check_alpha(alpha: object) -> None:
    """Refuse a penalty that is neither a number of at least 0 nor the name of a criterion."""
    if alpha in ("gcv", "loo") or (isinstance(alpha, Real) and 0 <= float(alpha) < np.inf):
        return
    raise ValueError(f"alpha={alpha!r}; wanted 'gcv', 'loo' or a finite number of at least 0")


def read_alphas(alphas: ArrayLike | None) -> torch.Tensor | None:
    """The penalties to choose from as a tensor."""
    if alphas is None:
        return None
    values = np.asarray(alphas, dtype=np.float64).ravel()
    if not (values.size and np.isfinite(values).all() and (values > 0).all()):
        raise ValueError(f"alphas={alphas!r}; wanted finite penalties above 0")
    return torch.from_numpy(values)

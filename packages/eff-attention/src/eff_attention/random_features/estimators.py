"""Estimators in scikit-learn's manner: random-feature attention fitted by ridge regression (arXiv 2307.11353)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d

from eff_attention.random_features.base import RandomFeatureBase
from eff_attention.random_features.features import Activation
from eff_attention.random_features.inputs import QueryFrom


class RandomFeatureAttentionRegressor(RegressorMixin, RandomFeatureBase):  # type: ignore[misc]
    """Regression on a query and a set of keys: an attention layer of many random heads, values fitted in closed form.

    f(X) = M^-1/2 sum_m (1/N) sum_i relu(x~_0^T W_m x~_i) <v_m, x~_i>, with W_m random and frozen and x~ = [x; 1]. The
    model does not depend on the order of the keys, and its sample complexity not on their number. Samples, parameters
    and attributes: `RandomFeatureBase`.
    """

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Fit the values of all heads.

        Args:
            X: Samples (see the class).
            y: [n], or [n, targets].

        Raises:
            ValueError: samples or targets have a wrong shape or values that are not finite; a sample has no key.
        """
        if y is None:
            raise ValueError("RandomFeatureAttentionRegressor requires y to be passed, but the target y is None")
        targets = check_array(y, ensure_2d=False, dtype=np.float64, input_name="y")
        if targets.ndim > 2:
            raise ValueError(f"y has shape {targets.shape}, wanted [n] or [n, targets]")
        fitted = self._fit(X, targets.reshape(len(targets), -1))
        self.coef_, self.intercept_ = fitted.coef.T.numpy(), fitted.intercept.numpy()
        self.dual_coef_ = None if fitted.dual is None else fitted.dual.numpy()
        if targets.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], self.intercept_[0]
            self.dual_coef_ = None if self.dual_coef_ is None else self.dual_coef_[:, 0]
        return self

    def predict(self, X: Any) -> NDArray[np.float64]:
        """[n], or [n, targets]."""
        out = self._decide(X)
        return out[:, 0] if self.coef_.ndim == 1 else out

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


def _has_probabilities(self: RandomFeatureAttentionClassifier) -> bool:
    if self.head != "logistic":
        raise AttributeError(f"head={self.head!r} gives no probabilities; use head='logistic'")
    return True


class RandomFeatureAttentionClassifier(ClassifierMixin, RandomFeatureBase):  # type: ignore[misc]
    """Classification of sets: ridge regression of -1 and 1 for each class on the features, or a logistic head on them.

    Samples, parameters and attributes are those of `RandomFeatureBase`, and one more:

    Args:
        head: "ridge" or "logistic". The latter is logistic regression with C = 1 / (2 n alpha); alpha must be a number
            then.
    """

    def __init__(
        self,
        n_heads: int = 512,
        *,
        head: str = "ridge",
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
        super().__init__(
            *(n_heads,),
            weight_mean=weight_mean,
            weight_std=weight_std,
            rank=rank,
            activation=activation,
            append_one=append_one,
            query=query,
            normalize=normalize,
            token_dim=token_dim,
            alpha=alpha,
            alphas=alphas,
            fit_intercept=fit_intercept,
            solver=solver,
            chunk_size=chunk_size,
            random_state=random_state,
        )
        self.head = head

    def fit(self, X: Any, y: ArrayLike) -> Self:
        """Fit the values of all heads to class labels ``y`` [n].

        Raises:
            ValueError: as for the regressor; there are fewer than two classes; alpha does not fit the head.
        """
        if self.head not in ("ridge", "logistic"):
            raise ValueError(f"head={self.head!r}; use 'ridge' or 'logistic'")
        if y is None:
            raise ValueError("RandomFeatureAttentionClassifier requires y to be passed, but the target y is None")
        labels = column_or_1d(y, warn=True)
        check_classification_targets(labels)
        self.classes_ = np.unique(labels)
        if len(self.classes_) < 2:
            raise ValueError(f"the targets hold {len(self.classes_)} class; a classifier needs at least two")
        if self.head == "logistic":
            return self._fit_logistic(X, labels)
        signs = LabelBinarizer(pos_label=1, neg_label=-1).fit_transform(labels).astype(np.float64)
        fitted = self._fit(X, signs)
        self.coef_, self.intercept_ = fitted.coef.T.numpy(), fitted.intercept.numpy()
        self.dual_coef_ = None if fitted.dual is None else fitted.dual.numpy()
        return self

    def _fit_logistic(self, X: Any, labels: NDArray[Any]) -> Self:
        if isinstance(self.alpha, str) or self.alpha <= 0:
            raise ValueError(f"head='logistic' needs a number above 0 for alpha, got {self.alpha!r}")
        features = self._prepare(X)
        if len(labels) != features.num_samples:
            raise ValueError(f"X holds {features.num_samples} samples and y {len(labels)}")
        phi = np.concatenate([block.numpy() for _, block in features.rows()])
        strength = 1 / (2 * len(phi) * float(self.alpha))
        self.logistic_ = LogisticRegression(C=strength, fit_intercept=self.fit_intercept, max_iter=2000)
        self.logistic_.fit(phi, labels)
        self.coef_, self.intercept_ = self.logistic_.coef_, self.logistic_.intercept_
        self.alpha_, self.dual_coef_ = float(self.alpha), None
        return self

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """[n] for two classes (positive: the second), else [n, classes]."""
        out = self._decide(X)
        return out[:, 0] if len(self.classes_) == 2 else out

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each sample, [n]."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    @available_if(_has_probabilities)  # type: ignore[untyped-decorator]
    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """[n, classes], for head="logistic"."""
        check_is_fitted(self)
        return self.logistic_.predict_proba(self.transform(X))

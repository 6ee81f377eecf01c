"""How even features are, and what a probe finds in them on both sides of a head."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Evenness(NamedTuple):
    """Spread of the variance of features over directions.

    Attributes:
        participation_ratio: ``(sum l)^2 / sum l^2`` of the eigenvalues of the covariance: 1 for one direction, the
            dimension for white features.
        entropy: Exponential of the entropy of the eigenvalues' shares (RankMe's effective rank of the covariance).
        condition: Largest over smallest eigenvalue; infinite without full rank.
    """

    participation_ratio: float
    entropy: float
    condition: float


def evenness(features: Tensor) -> Evenness:
    """Evenness of features [N, d], N >= 2.

    Raises:
        ValueError: the shape is another, values are not finite, or all features are constant.
    """
    if features.ndim != 2 or features.size(0) < 2:
        raise ValueError(f"features must be [N >= 2, d], got {list(features.shape)}")
    if not bool(features.isfinite().all()):
        raise ValueError("features hold values that are not finite")
    values = torch.linalg.eigvalsh(torch.cov(features.double().T).reshape(features.size(1), -1)).clamp_min(0)
    total = values.sum()
    if not total > 0:
        raise ValueError("all features are constant")
    shares = values / total
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum()
    return Evenness(float(total**2 / values.square().sum()), float(entropy.exp()), float(values[-1] / values[0]))


class HeadComparison(NamedTuple):
    """Accuracies of probes, and evenness, before and after the head."""

    pre_accuracy: float
    post_accuracy: float
    pre: Evenness
    post: Evenness

    @property
    def keep(self) -> Literal["pre", "post"]:
        """The side on which the probe finds more; the features before the head where they are equal."""
        return "pre" if self.pre_accuracy >= self.post_accuracy else "post"


def probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    kind: Literal["ridge", "logistic"] = "logistic",
    shots: int | None = None,
    seed: int = 0,
) -> float:
    """Accuracy of a linear probe on standardised features (extra ``sklearn``).

    Args:
        train: [N, d].
        train_labels: Class of each, [N].
        test: [M, d].
        test_labels: [M].
        kind: Ridge classifier or logistic regression, both with scikit-learn's default penalty.
        shots: Most training items of a class, drawn at random; None takes all.
        seed: Of that draw.
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind must be 'ridge' or 'logistic', got {kind!r}")
    if shots is not None:
        chosen = _few(train_labels, shots, seed)
        train, train_labels = train[chosen], train_labels[chosen]
    model = RidgeClassifier() if kind == "ridge" else LogisticRegression(max_iter=2000)
    fitted = make_pipeline(StandardScaler(), model).fit(_numpy(train), train_labels.cpu().numpy())
    return float(fitted.score(_numpy(test), test_labels.cpu().numpy()))


def compare_pre_post(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    train_labels: Tensor,
    test_labels: Tensor,
    *,
    shots: int | None = None,
    seed: int = 0,
) -> HeadComparison:
    """Probe both sides of a head (section 5 says when which side is better).

    Args:
        train: Features and projections of the training items, as `HeadedEncoder` gives them.
        test: The same of the test items.
        train_labels: [N].
        test_labels: [M].
        shots: See `probe`.
        seed: See `probe`.
    """
    pre, post = (probe(train[i], train_labels, test[i], test_labels, shots=shots, seed=seed) for i in (0, 1))
    return HeadComparison(pre, post, evenness(test[0]), evenness(test[1]))


def _few(labels: Tensor, shots: int, seed: int) -> Tensor:
    if shots < 1:
        raise ValueError(f"shots must be 1 or more, got {shots}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels.cpu()[order] == c][:shots] for c in labels.cpu().unique()])


def _numpy(x: Tensor) -> object:
    return x.detach().cpu().double().numpy()

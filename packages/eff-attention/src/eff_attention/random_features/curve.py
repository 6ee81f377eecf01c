"""Error against the number of training samples, for several models and seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.base import RegressorMixin

from eff_attention.random_features.targets import TARGETS, Target, sample_sets


class CurvePoint(NamedTuple):
    """One fit.

    Attributes:
        target: Name of the target.
        model: Name of the model.
        n: Training samples.
        seed: Of data and model.
        error: Mean squared error on test samples over the variance of their targets; 1 is as good as the mean.
        alpha: The penalty that the model chose, or NaN.
        seconds: Time of the fit.
    """

    target: str
    model: str
    n: int
    seed: int
    error: float
    alpha: float
    seconds: float


def sample_complexity_curve(
    target: str | Target,
    models: Mapping[str, Callable[[int], RegressorMixin]],
    ns: Sequence[int],
    seeds: Sequence[int],
    *,
    num_keys: int = 16,
    dim: int = 4,
    num_test: int = 2000,
    noise: float = 0.0,
) -> Iterator[CurvePoint]:
    """Fit every model at every size and seed on points of the sphere (section 5 of the paper).

    Models at one seed see the same samples, and a smaller training set is the beginning of a larger one. Points come as
    they are done, so that a long run can be shown, stopped and kept: ``pandas.DataFrame(points)`` is the table.

    Args:
        target: A name in `TARGETS`, or a function of samples [n, num_keys + 1, dim] to [n].
        models: Makers of an estimator from a seed.
        ns: Sizes of the training set.
        seeds: Seeds.
        num_keys: N.
        dim: d.
        num_test: Test samples, the same for all sizes.
        noise: Standard deviation of the noise on training targets, in standard deviations of the target.
    """
    if isinstance(target, str) and target not in TARGETS:
        raise ValueError(f"target={target!r}; known are {sorted(TARGETS)}")
    name, function = (target, TARGETS[target]) if isinstance(target, str) else (target.__name__, target)
    for seed in seeds:
        random = np.random.RandomState(seed)
        test = sample_sets(num_test, num_keys, dim, random)
        train = sample_sets(max(ns), num_keys, dim, random)
        wanted, y = function(test), function(train)
        y = y + noise * wanted.std() * random.standard_normal(len(y))
        for n in ns:
            for label, make in models.items():
                model = make(seed)
                start = time.perf_counter()
                model.fit(train[:n], y[:n])
                seconds = time.perf_counter() - start
                error = float(np.square(model.predict(test) - wanted).mean() / wanted.var())
                yield CurvePoint(name, label, n, seed, error, float(getattr(model, "alpha_", np.nan)), seconds)

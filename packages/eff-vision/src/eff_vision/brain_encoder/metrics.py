"""How well responses are predicted."""

from __future__ import annotations

import torch
from torch import Tensor


def pearson_columns(prediction: Tensor, target: Tensor) -> Tensor:
    """Pearson correlation of each target, float64 [V]; NaN where either side is constant.

    Args:
        prediction: [N, V], N >= 2.
        target: [N, V].

    Raises:
        ValueError: the shapes differ, or there are fewer than two rows.
    """
    if prediction.shape != target.shape or prediction.ndim != 2 or prediction.size(0) < 2:
        raise ValueError(
            f"wanted two tensors [N >= 2, V] of one shape, got {list(prediction.shape)} and {list(target.shape)}"
        )
    p, t = (x.double() - x.double().mean(0) for x in (prediction, target))
    return (p * t).sum(0) / (p.square().sum(0) * t.square().sum(0)).sqrt()


def encoding_accuracy(
    prediction: Tensor, target: Tensor, noise_ceiling: Tensor | float | None = None, *, keep_sign: bool = True
) -> Tensor:
    """Squared correlation over the noise ceiling, at most 1, float64 [V].

    Args:
        prediction: [N, V].
        target: [N, V].
        noise_ceiling: Largest share of variance that a model can explain, [V]; None is 1. Targets with a ceiling of 0
            get NaN.
        keep_sign: Whether a negative correlation counts as negative; squared alone it would look like success.
    """
    r = pearson_columns(prediction, target)
    score = r.square() * r.sign() if keep_sign else r.square()
    if noise_ceiling is not None:
        ceiling = torch.as_tensor(noise_ceiling, dtype=torch.float64).expand_as(score)
        if bool((ceiling < 0).any()):
            raise ValueError("noise ceilings must not be negative")
        score = torch.where(ceiling > 0, score / ceiling, torch.nan)
    return score.clamp(max=1)

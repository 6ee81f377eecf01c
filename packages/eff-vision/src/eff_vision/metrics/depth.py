"""Depth: absolute relative error, RMSE and shares within a factor, after an alignment that is named."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Alignment = Literal["none", "median", "scale", "scale_shift"]


class DepthScores(NamedTuple):
    """Means over the valid pixels of each map, then over maps.

    Attributes:
        abs_rel: Mean of ``|p - g| / g``.
        sq_rel: Mean of ``(p - g)^2 / g``, in the unit of depth.
        rmse: Root of the mean square error, in the unit of depth.
        rmse_log: The same of natural logarithms.
        delta1: Share with ``max(p / g, g / p) < 1.25``.
        delta2: The same for 1.25^2.
        delta3: The same for 1.25^3.
    """

    abs_rel: float
    sq_rel: float
    rmse: float
    rmse_log: float
    delta1: float
    delta2: float
    delta3: float


def align_depth(prediction: Tensor, target: Tensor, valid: Tensor, alignment: Alignment) -> Tensor:
    """Predictions [B, ...] brought to the scale of the truth, each map by itself.

    "median" matches medians, "scale" is the least-squares factor, "scale_shift" the least-squares line.
    """
    if alignment == "none":
        return prediction
    if alignment not in ("median", "scale", "scale_shift"):
        raise ValueError(f"alignment={alignment!r}; use 'none', 'median', 'scale' or 'scale_shift'")
    aligned = []
    for p, g, v in zip(prediction, target, valid, strict=True):
        x, y = p[v].double(), g[v].double()
        if alignment == "median":
            aligned.append(p * (y.median() / x.median()))
        elif alignment == "scale":
            aligned.append(p * ((x * y).sum() / (x * x).sum()))
        else:
            slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
            aligned.append(p * slope + (y.mean() - slope * x.mean()))
    return torch.stack([a.to(prediction.dtype) for a in aligned])


def depth_metrics(
    prediction: Tensor,
    target: Tensor,
    valid: Tensor | None = None,
    *,
    alignment: Alignment = "none",
    min_depth: float = 1e-3,
    max_depth: float = float("inf"),
) -> DepthScores:
    """Compare depth maps [B, ...].

    Args:
        prediction: Positive depths; values below ``min_depth`` are raised to it after the alignment.
        target: True depths, in the same unit.
        valid: bool, what counts; pixels with a true depth outside (min_depth, max_depth) or not finite never count.
        alignment: See `align_depth`.
        min_depth: Smallest true depth that counts.
        max_depth: Largest true depth that counts.

    Raises:
        ValueError: the shapes differ, a prediction is not finite where it counts, or a map has no valid pixel.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {list(prediction.shape)} and target {list(target.shape)} must have one shape")
    counts = target.isfinite() & (target > min_depth) & (target < max_depth)
    if valid is not None:
        counts = counts & valid
    if bool((counts.flatten(1).sum(1) == 0).any()):
        raise ValueError("a depth map has no valid pixel; leave it out")
    if not bool(prediction[counts].isfinite().all()):
        raise ValueError("the prediction holds values that are not finite")
    aligned = align_depth(prediction, target, counts, alignment)
    rows = [
        _one(p[v].double().clamp_min(min_depth), g[v].double()) for p, g, v in zip(aligned, target, counts, strict=True)
    ]
    return DepthScores(*(float(x) for x in torch.stack(rows).mean(0)))


def _one(p: Tensor, g: Tensor) -> Tensor:
    error = p - g
    ratio = torch.maximum(p / g, g / p)
    return torch.stack(
        (
            (error.abs() / g).mean(),
            (error**2 / g).mean(),
            (error**2).mean().sqrt(),
            (p.log() - g.log()).square().mean().sqrt(),
            *((ratio < 1.25**k).double().mean() for k in (1, 2, 3)),
        )
    )

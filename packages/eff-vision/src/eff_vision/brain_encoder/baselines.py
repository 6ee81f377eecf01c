"""What the encoder is compared with: ridge in closed form, a static map for each query, and a small convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RidgeEncoder:
    """Ridge regression from flattened features to all targets, with the best penalty of each target.

    Targets and features are centred; the intercept is not penalised. One decomposition serves all penalties.

    Args:
        alphas: Penalties to choose from.
        per_target: Whether each target has its own; else the one that is best on average.
    """

    def __init__(self, alphas: Sequence[float] = (1.0, 10.0, 100.0, 1e3, 1e4, 1e5), *, per_target: bool = True) -> None:
        if not alphas or min(alphas) <= 0:
            raise ValueError(f"alphas must be positive, got {list(alphas)}")
        self.alphas = tuple(float(a) for a in alphas)
        self.per_target = per_target

    def fit(self, x: Tensor, y: Tensor, validation: tuple[Tensor, Tensor] | None = None) -> RidgeEncoder:
        """Fit features [N, D] to targets [N, V].

        The penalty is chosen by the squared error on ``validation``, or without it by generalised cross-validation.

        Raises:
            ValueError: the numbers of rows differ, or values are not finite.
        """
        if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
            raise ValueError(f"wanted [N >= 2, D] and [N, V], got {list(x.shape)} and {list(y.shape)}")
        if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
            raise ValueError("features or targets hold values that are not finite")
        x, y = x.double(), y.double()
        self._mean_x, mean_y = x.mean(0), y.mean(0)
        u, s, vh = torch.linalg.svd(x - self._mean_x, full_matrices=False)
        projected = u.T @ (y - mean_y)
        losses = torch.stack([
            self._loss(a, u, s, vh, projected, y - mean_y, mean_y, validation) for a in self.alphas
        ])  # fmt: skip
        best = losses.argmin(0) if self.per_target else losses.mean(1).argmin().expand(y.size(1))
        self.alpha = torch.tensor(self.alphas, dtype=torch.float64)[best]
        shrunk = s[:, None] / (s[:, None] ** 2 + self.alpha)
        self.weight = vh.T @ (shrunk * projected)
        self._mean_y = mean_y
        return self

    def _loss(
        self,
        alpha: float,
        u: Tensor,
        s: Tensor,
        vh: Tensor,
        projected: Tensor,
        y: Tensor,
        mean_y: Tensor,
        validation: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        if validation is not None:
            weight = vh.T @ ((s / (s**2 + alpha))[:, None] * projected)
            fitted = (validation[0].double() - self._mean_x) @ weight + mean_y
            return (fitted - validation[1].double()).square().mean(0)
        share = s**2 / (s**2 + alpha)
        residual = (y - u @ (share[:, None] * projected)).square().mean(0)
        freedom = (share.sum() + 1) / len(y)  # the intercept counts
        return residual / (1 - freedom) ** 2

    def predict(self, x: Tensor) -> Tensor:
        """Responses [N, V] to features [N, D]."""
        return (x.double() - self._mean_x) @ self.weight + self._mean_y


class SpatialFeatureEncoder(nn.Module):
    """A map over places and a map over features for each group of targets: where and what, apart (factorised read-out).

    Args:
        num_patches: Patches of a picture.
        feature_dim: Features of a patch.
        groups: Group of each target, int [V]; the targets of a group share the map over places.
    """

    def __init__(self, num_patches: int, feature_dim: int, groups: Tensor) -> None:
        super().__init__()
        if groups.ndim != 1 or int(groups.min()) < 0:
            raise ValueError("groups must be integers [V] of 0 or more")
        self.place = nn.Parameter(torch.zeros(int(groups.max()) + 1, num_patches))
        self.readout = nn.Linear(feature_dim, groups.numel())
        self.register_buffer("groups", groups)

    def forward(self, features: Tensor) -> Tensor:
        """Responses [B, V] to patch features [B, S, D]."""
        groups: Tensor = self.groups  # type: ignore[assignment]
        pooled = torch.einsum("gs,bsd->bgd", self.place.softmax(-1), features)
        return torch.einsum("bvd,vd->bv", pooled[:, groups], self.readout.weight) + self.readout.bias


class LinearConvEncoder(nn.Module):
    """A strided convolution, then a linear map of all that is left: the paper's linear baseline.

    Args:
        feature_dim: Features of a patch.
        grid: Rows and columns of patches.
        num_targets: Number of responses.
        channels: Output channels of the convolution.
    """

    def __init__(self, feature_dim: int, grid: tuple[int, int], num_targets: int, channels: int = 256) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(feature_dim, channels, 3, stride=3, padding=1)
        left = ((grid[0] + 2) // 3) * ((grid[1] + 2) // 3) * channels
        self.readout = nn.Linear(left, num_targets)

    def forward(self, features: Tensor) -> Tensor:
        """Responses [B, V] to patch features [B, S, D]."""
        maps = features.transpose(1, 2).unflatten(-1, self.grid)
        return self.readout(self.conv(maps).flatten(1))

    def penalty(self) -> Tensor:
        """Sum of the norms of all weights; the official code adds 0.02 of it to the loss."""
        return torch.stack([p.norm() for p in self.parameters()]).sum()

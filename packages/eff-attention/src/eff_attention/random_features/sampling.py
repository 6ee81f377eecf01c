"""Frozen products of query and key matrices, drawn at random (arXiv 2307.11353)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


class HeadWeights(NamedTuple):
    """The scores of M heads, s_m(x, y) = x^T W_m y, with W_m dense or of low rank.

    Attributes:
        dense: [M, Dq, Dk], or None for low rank.
        query: [M, r, Dq], or None; W_m = query_m^T key_m + mean.
        key: [M, r, Dk], or None.
        mean: [Dq, Dk] added to every low-rank product, or None for nothing. A dense W holds its mean already.
    """

    dense: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    mean: Tensor | None = None

    @property
    def num_heads(self) -> int:
        """M."""
        return len(self.dense if self.dense is not None else self._low_rank()[0])

    @property
    def query_dim(self) -> int:
        """Dq, the appended one counted."""
        return (self.dense.shape[1]) if self.dense is not None else self._low_rank()[0].shape[2]

    @property
    def key_dim(self) -> int:
        """Dk, the appended one counted."""
        return (self.dense.shape[2]) if self.dense is not None else self._low_rank()[1].shape[2]

    def _low_rank(self) -> tuple[Tensor, Tensor]:
        if self.query is None or self.key is None:
            raise ValueError("HeadWeights needs dense, or query and key")
        return self.query, self.key

    def project(self, query: Tensor) -> Tensor:
        """W_m^T x of every head: [..., Dq] to [..., M, Dk]."""
        if self.dense is not None:
            return torch.einsum("...a,mab->...mb", query, self.dense)
        left, right = self._low_rank()
        projected = torch.einsum("...mr,mrb->...mb", torch.einsum("...a,mra->...mr", query, left), right)
        return projected if self.mean is None else projected + (query @ self.mean).unsqueeze(-2)

    def heads(self, part: slice) -> HeadWeights:
        """A part of the heads."""
        dense, query, key = (None if t is None else t[part] for t in self[:3])
        return HeadWeights(dense, query, key, self.mean)


def mean_weights(mean: float | str | ArrayLike, query_dim: int, key_dim: int, *, append_one: bool) -> np.ndarray | None:
    """The mean of W_m, [Dq, Dk]: None for zero, kappa diag(I_d, 0) for a number kappa, the array that is given.

    Raises:
        ValueError: an unknown word, a shape that does not fit, or an identity between different dimensions.
    """
    if isinstance(mean, str):
        if mean != "identity":
            raise ValueError(f"weight_mean={mean!r}; use 'identity', a number or an array [{query_dim}, {key_dim}]")
        mean = 1.0
    values = np.asarray(mean, dtype=np.float64)
    if values.ndim:
        if values.shape != (query_dim, key_dim):
            raise ValueError(f"weight_mean has shape {values.shape}, wanted ({query_dim}, {key_dim})")
        return values
    if values == 0:
        return None
    if query_dim != key_dim:
        raise ValueError(f"an identity as mean needs queries and keys of one size, got {query_dim} and {key_dim}")
    diagonal = np.full(query_dim, float(values))
    if append_one:
        diagonal[-1] = 0.0  # section 4 of the paper: the bias reads <x_0, x_i> and leaves the appended ones alone
    return np.diag(diagonal)


def sample_heads(
    num_heads: int,
    query_dim: int,
    key_dim: int,
    random: np.random.RandomState,
    *,
    mean: np.ndarray | None = None,
    std: float = 0.5,
    rank: int | None = None,
) -> HeadWeights:
    """Draw M matrices with entries N(mean, std^2); of low rank, sums of r products with the same variance.

    With std = 1/2 and ||x~||^2 = 2 (unit vectors with a one appended) the scores x~^T W y~ have variance 1.

    Args:
        num_heads: M.
        query_dim: Dq, with the appended one.
        key_dim: Dk, with the appended one.
        random: Source of the numbers; one state gives one set of weights, whatever uses them.
        mean: [Dq, Dk] added to each, or None.
        std: Standard deviation of an entry.
        rank: r of Q_m^T K_m with Q_m [r, Dq] and K_m [r, Dk], entries N(0, std / sqrt(r)); None for dense.

    Returns:
        Weights in float64.
    """
    if num_heads < 1 or (rank is not None and rank < 1):
        raise ValueError(f"n_heads={num_heads} and rank={rank} must be at least 1")
    if not (np.isfinite(std) and std >= 0):
        raise ValueError(f"weight_std={std}; wanted a number of at least 0")
    offset = None if mean is None else torch.from_numpy(mean)
    if rank is None:
        dense = torch.from_numpy(random.standard_normal((num_heads, query_dim, key_dim)) * std)
        return HeadWeights(dense if offset is None else dense + offset)
    scale = np.sqrt(std) / rank**0.25  # Var(W_ab) = r * scale^4 = std^2
    query = torch.from_numpy(random.standard_normal((num_heads, rank, query_dim)) * scale)
    key = torch.from_numpy(random.standard_normal((num_heads, rank, key_dim)) * scale)
    return HeadWeights(query=query, key=key, mean=offset)

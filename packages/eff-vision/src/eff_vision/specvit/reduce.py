"""Principal components of the bands."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class PCAReducer:
    """Principal components, whitened: each has variance 1 over the pixels that it was fitted on.

    Args:
        num_components: How many to keep.
        whiten: Whether to scale them.
    """

    def __init__(self, num_components: int = 15, *, whiten: bool = True) -> None:
        if num_components < 1:
            raise ValueError(f"num_components must be 1 or more, got {num_components}")
        self.num_components, self.whiten = num_components, whiten

    def fit(self, cube: NDArray[np.float32], mask: NDArray[np.bool_] | None = None) -> PCAReducer:
        """Fit on the pixels of ``mask`` [H, W]: the training pixels, or all of the scene without one (transductive).

        Raises:
            ValueError: fewer bands or pixels than components.
        """
        pixels = cube.reshape(-1, cube.shape[-1]) if mask is None else cube[mask]
        pixels = pixels.astype(np.float64)
        if min(pixels.shape) < self.num_components:
            raise ValueError(
                f"{pixels.shape[0]} pixels of {pixels.shape[1]} bands are too few for {self.num_components} components"
            )
        self.mean = pixels.mean(0)
        covariance = np.cov(pixels - self.mean, rowvar=False).reshape(pixels.shape[1], -1)
        values, vectors = np.linalg.eigh(covariance)
        order = values.argsort()[::-1][: self.num_components]
        self.explained = float(values[order].sum() / values.sum())
        vectors = vectors[:, order]
        # eigh leaves signs open: the largest entry of each component is made positive, so that a fit is repeatable.
        vectors *= np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
        self.components = vectors / np.sqrt(values[order].clip(1e-12)) if self.whiten else vectors
        return self

    def transform(self, cube: NDArray[np.float32]) -> NDArray[np.float32]:
        """Components [..., num_components] of spectra [..., bands]."""
        if cube.shape[-1] != len(self.mean):
            raise ValueError(f"wanted {len(self.mean)} bands, got {cube.shape[-1]}")
        return ((cube.astype(np.float64) - self.mean) @ self.components).astype(np.float32)

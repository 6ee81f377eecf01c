"""Patches around labelled pixels, cut when they are asked for."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from eff_vision.specvit.reduce import PCAReducer
from eff_vision.specvit.scene import HsiScene


class HsiPatches(Dataset[tuple[Tensor, int]]):
    """Patches [bands, P, P] and classes from 0 on, of the pixels of a mask in reading order.

    Args:
        scene: The scene.
        mask: bool [H, W]; pixels without a label are refused.
        patch: P, odd.
        reducer: A fitted reducer of the bands, or None for the bands themselves.
        standardize: "patch" subtracts each channel's mean over the patch and divides by its deviation, as the official
            code does; it takes the level of the spectrum away and costs about 8 points on Indian Pines.
    """

    def __init__(
        self,
        scene: HsiScene,
        mask: NDArray[np.bool_],
        *,
        patch: int = 15,
        reducer: PCAReducer | None = None,
        standardize: Literal["patch"] | None = None,
    ) -> None:
        if patch < 1 or patch % 2 == 0:
            raise ValueError(f"patch must be odd, so that it has a centre, got {patch}")
        if mask.shape != scene.labels.shape or (scene.labels[mask] == 0).any():
            raise ValueError("the mask must be [H, W] and mark labelled pixels only")
        self.patch, self.standardize = patch, standardize
        values = scene.cube if reducer is None else reducer.transform(scene.cube)
        half = patch // 2
        padded = np.pad(values, ((half, half), (half, half), (0, 0)))
        self.values = torch.from_numpy(np.ascontiguousarray(padded.transpose(2, 0, 1)))
        self.places = np.argwhere(mask)
        self.classes = torch.from_numpy(scene.labels[mask] - 1)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.batch(torch.tensor([index]))[0], int(self.classes[index])

    def batch(self, indices: Tensor) -> Tensor:
        """Patches [B, bands, P, P] of several pixels."""
        return self.cut(self.places[indices.numpy()])

    def cut(self, places: NDArray[np.int64]) -> Tensor:
        """Patches around any pixels (row, column), [B, bands, P, P]; beyond the border they are zero."""
        side = range(self.patch)
        rows = torch.from_numpy(places[:, 0])[:, None, None] + torch.tensor(list(side))[None, :, None]
        columns = torch.from_numpy(places[:, 1])[:, None, None] + torch.tensor(list(side))[None, None, :]
        cut = self.values[:, rows, columns].movedim(0, 1)
        if self.standardize == "patch":
            deviation = cut.flatten(2).std(-1, correction=0)[..., None, None]
            cut = (cut - cut.flatten(2).mean(-1)[..., None, None]) / (deviation + 1e-8)
        return cut

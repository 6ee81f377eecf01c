"""Hyperspectral scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class HsiScene:
    """A cube and its labels.

    Attributes:
        cube: float32 [H, W, bands], finite.
        labels: int64 [H, W]; 0 is unlabelled, classes count from 1.
        names: Names of the classes from 1 on, or empty.
    """

    cube: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cube.ndim != 3 or self.labels.shape != self.cube.shape[:2]:
            raise ValueError(
                f"wanted a cube [H, W, bands] with labels [H, W], got {self.cube.shape}, {self.labels.shape}"
            )
        if not np.isfinite(self.cube).all():
            raise ValueError("the cube holds values that are not finite")
        if self.labels.min() < 0:
            raise ValueError(f"labels must not be negative, got {self.labels.min()}")
        if self.names and len(self.names) < self.num_classes:
            raise ValueError(f"{self.num_classes} classes need one name each, got {len(self.names)}")

    @property
    def num_classes(self) -> int:
        """Number of classes, the unlabelled one not counted."""
        return int(self.labels.max())


def load_hsi(path: str | Path, *, data_key: str | None = None, label_key: str | None = None) -> HsiScene:
    """Read a scene from one .npz or .mat file that holds a cube and a map of labels.

    Args:
        path: The file; .mat files need scipy (extra ``sklearn``).
        data_key: Name of the cube; by default the only array of three dimensions.
        label_key: Name of the labels; by default the only array of two dimensions with whole numbers.

    Raises:
        ValueError: the file holds no such array, or several, or is of another kind.
    """
    path = Path(path)
    arrays = _arrays(path)
    cube = _pick(arrays, data_key, lambda a: a.ndim == 3, f"cube in {path}")
    labels = _pick(arrays, label_key, lambda a: a.ndim == 2 and min(a.shape) > 1 and _whole(a), f"labels in {path}")
    return HsiScene(cube.astype(np.float32), labels.astype(np.int64))


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    if path.suffix == ".mat":
        from scipy.io import loadmat

        try:
            return {k: v for k, v in loadmat(path).items() if not k.startswith("__")}
        except NotImplementedError as error:
            raise ValueError(f"{path} is a MATLAB 7.3 file (HDF5); save it as version 7 or as .npz") from error
    raise ValueError(f"{path} is neither .npz nor .mat")


def _whole(a: NDArray[Any]) -> bool:
    return a.dtype.kind in "iub" or (a.dtype.kind == "f" and bool((a == np.round(a)).all()))


def _pick(arrays: dict[str, NDArray[Any]], key: str | None, fits: Any, what: str) -> NDArray[Any]:
    if key is not None:
        if key not in arrays:
            raise ValueError(f"no {what} called {key!r}; there are {sorted(arrays)}")
        return arrays[key]
    found = [k for k, a in arrays.items() if fits(a)]
    if len(found) != 1:
        raise ValueError(f"no single {what}: {found or sorted(arrays)}; name it")
    return arrays[found[0]]

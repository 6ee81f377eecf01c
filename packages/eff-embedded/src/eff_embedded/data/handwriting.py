"""Handwritten digits of scikit-learn."""

from __future__ import annotations

import gzip
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from eff_embedded.data.packages import package_file


class Digits(NamedTuple):
    """Pictures of digits.

    Attributes:
        images: [1797, 1, 8, 8], float32 between 0 and 1.
        labels: [1797], int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor


def digits() -> Digits:
    """The test part of UCI's optical recognition of handwritten digits, in the order of the file.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    path = package_file("sklearn", "datasets", "data", "digits.csv.gz", install="eff-embedded[digits]")
    with gzip.open(path, "rt", encoding="ascii") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return Digits(table[:, :64].reshape(-1, 1, 8, 8) / 16, table[:, 64].long())

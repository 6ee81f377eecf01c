"""The two formats, and the least magnitude of a row."""

from __future__ import annotations

from typing import Final

import torch

EPS: Final = 1e-12
"""The least magnitude that a row is scaled by, so that a row of zeros has a finite scale."""


FORMATS: Final = {torch.float8_e4m3fn: 0, torch.float8_e5m2: 1}
"""Codes of ``eff_fp8`` in fp8.h."""


def check_fp8(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless the dtype is one of the two."""
    if dtype not in FORMATS:
        raise TypeError(f"{name} must be torch.float8_e4m3fn or torch.float8_e5m2, got {dtype}")

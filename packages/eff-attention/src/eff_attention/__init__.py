"""Attention variants, one sub-package each: `eff_attention.neighborhood`.

Importing this package loads torch and nothing larger; transformers is imported by the functions that need it.
"""

from eff_attention.neighborhood import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_attention",
]

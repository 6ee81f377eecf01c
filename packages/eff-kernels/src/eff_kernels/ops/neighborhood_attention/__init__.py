"""Neighborhood attention: each query attends to the window of keys around it on a 1-D, 2-D or 3-D map."""

from eff_kernels.ops.neighborhood_attention.api import NeighborhoodAttention, neighborhood_attention
from eff_kernels.ops.neighborhood_attention.common import neighborhood_mask, window_bounds

__all__ = ["NeighborhoodAttention", "neighborhood_attention", "neighborhood_mask", "window_bounds"]

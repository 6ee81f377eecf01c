"""Neighborhood attention: natten's functions and modules, the unfused halves, and what plugs them into transformers."""

from eff_attention.neighborhood.dinat import enable_dinat
from eff_attention.neighborhood.functional import na1d, na2d, na3d, na_flops, na_mask_mod, neighborhood_attention
from eff_attention.neighborhood.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from eff_attention.neighborhood.sliding_window import register_sliding_window
from eff_attention.neighborhood.unfused import (
    na_av,
    na_qk,
    natten1dav,
    natten1dqkrpb,
    natten2dav,
    natten2dqkrpb,
    natten3dav,
    natten3dqkrpb,
)

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "enable_dinat",
    "na1d",
    "na2d",
    "na3d",
    "na_av",
    "na_flops",
    "na_mask_mod",
    "na_qk",
    "natten1dav",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqkrpb",
    "neighborhood_attention",
    "register_sliding_window",
]

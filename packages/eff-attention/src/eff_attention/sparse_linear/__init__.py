"""Sparse-linear attention: exact softmax over critical blocks, linear attention over the rest (arXiv 2509.24006).

The functions behind it are ops: `eff_kernels.block_map` and `eff_kernels.sparse_linear_attention`.
"""

from eff_kernels.edit import cosine

from eff_attention.sparse_linear.apply import (
    apply_sla,
    freeze_backbone,
    load_sla,
    save_sla,
    sla_modules,
    sla_parameters,
)
from eff_attention.sparse_linear.calibrate import SLAFit, calibrate_sla
from eff_attention.sparse_linear.config import SLAConfig
from eff_attention.sparse_linear.distill import AttentionDistiller
from eff_attention.sparse_linear.modules import SparseLinearAttention
from eff_attention.sparse_linear.order import tile_order
from eff_attention.sparse_linear.token_level import token_linear_attention

__all__ = [
    "AttentionDistiller",
    "SLAConfig",
    "SLAFit",
    "SparseLinearAttention",
    "apply_sla",
    "calibrate_sla",
    "cosine",
    "freeze_backbone",
    "load_sla",
    "save_sla",
    "sla_modules",
    "sla_parameters",
    "tile_order",
    "token_linear_attention",
]

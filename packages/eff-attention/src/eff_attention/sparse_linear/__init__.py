"""Sparse-linear attention: exact softmax over critical blocks, linear attention over the rest (arXiv 2509.24006)."""

from eff_attention.sparse_linear.apply import (
    apply_sla,
    freeze_backbone,
    load_sla,
    save_sla,
    sla_modules,
    sla_parameters,
)
from eff_attention.sparse_linear.block_map import BlockMap, block_map
from eff_attention.sparse_linear.calibrate import SLAFit, calibrate_sla
from eff_attention.sparse_linear.config import SLAConfig
from eff_attention.sparse_linear.distill import AttentionDistiller, cosine
from eff_attention.sparse_linear.functional import (
    SparseLinearOutput,
    feature_map,
    linear_branch,
    sparse_linear_attention,
)
from eff_attention.sparse_linear.modules import SparseLinearAttention
from eff_attention.sparse_linear.order import tile_order

__all__ = [
    "AttentionDistiller",
    "BlockMap",
    "SLAConfig",
    "SLAFit",
    "SparseLinearAttention",
    "SparseLinearOutput",
    "apply_sla",
    "block_map",
    "calibrate_sla",
    "cosine",
    "feature_map",
    "freeze_backbone",
    "linear_branch",
    "load_sla",
    "save_sla",
    "sla_modules",
    "sla_parameters",
    "sparse_linear_attention",
    "tile_order",
]

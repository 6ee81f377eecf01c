"""Transformer operations for PyTorch: a readable reference, fast CPU code and Triton kernels behind one function each.

Ops dispatch by themselves (`eff_kernels.op`); `eff_kernels.edit` changes models and takes the change back.
"""

from importlib.metadata import version

from eff_kernels.edit import Handle, Report, SkippedModulesError, fits, matches, replace_module, select
from eff_kernels.op import Backend, BackendError, Explanation, Op, explain, triton_backend
from eff_kernels.ops.attention_columns import AttentionColumns, attention_columns
from eff_kernels.ops.attention_rows import CalibratedRow, row_calibrated, row_scores, row_values
from eff_kernels.ops.attention_shift import Attended, can_shift, move_weights, scale_weights
from eff_kernels.ops.block_sparse_attention import BlockSparseAttention, block_sparse_attention
from eff_kernels.ops.decode_attention import ScoredAttention, decode_attention, scored_decode_attention
from eff_kernels.ops.fp4_linear import fp4_linear
from eff_kernels.ops.fp4_quantize import FP4Codes, fp4_dequantize, fp4_quantize
from eff_kernels.ops.fp8_linear import fp8_linear
from eff_kernels.ops.fp8_quantize import FP8Rows, fp8_quantize, fp8_round
from eff_kernels.ops.group_linear import GroupWeight, group_linear
from eff_kernels.ops.grouped_lora import grouped_lora
from eff_kernels.ops.int4_linear import int4_linear, int4_pack, int4_unpack, int8_static_linear
from eff_kernels.ops.int8_linear import int8_linear
from eff_kernels.ops.int8_quantize import Int8Columns, Int8Rows, int8_quantize_columns, int8_quantize_rows
from eff_kernels.ops.linear import linear
from eff_kernels.ops.neighborhood_attention import NeighborhoodAttention, neighborhood_attention
from eff_kernels.ops.rms_norm import AddRMSNorm, add_rms_norm, rms_norm
from eff_kernels.ops.rope import rope
from eff_kernels.ops.row_write import row_write
from eff_kernels.ops.self_gated_scan import SelfGatedScanOutput, self_gated_scan
from eff_kernels.ops.sparse_linear_attention import BlockMap, SparseLinearOutput, block_map, sparse_linear_attention
from eff_kernels.ops.swiglu import swiglu
from eff_kernels.ops.taylor_linear_attention import TaylorAttentionOutput, taylor_linear_attention, taylor_state_shape

__all__ = [
    "AddRMSNorm",
    "Attended",
    "AttentionColumns",
    "Backend",
    "BackendError",
    "BlockMap",
    "BlockSparseAttention",
    "CalibratedRow",
    "Explanation",
    "FP4Codes",
    "FP8Rows",
    "GroupWeight",
    "Handle",
    "Int8Columns",
    "Int8Rows",
    "NeighborhoodAttention",
    "Op",
    "Report",
    "ScoredAttention",
    "SelfGatedScanOutput",
    "SkippedModulesError",
    "SparseLinearOutput",
    "TaylorAttentionOutput",
    "__version__",
    "add_rms_norm",
    "attention_columns",
    "block_map",
    "block_sparse_attention",
    "can_shift",
    "decode_attention",
    "explain",
    "fits",
    "fp4_dequantize",
    "fp4_linear",
    "fp4_quantize",
    "fp8_linear",
    "fp8_quantize",
    "fp8_round",
    "group_linear",
    "grouped_lora",
    "int4_linear",
    "int4_pack",
    "int4_unpack",
    "int8_linear",
    "int8_quantize_columns",
    "int8_quantize_rows",
    "int8_static_linear",
    "linear",
    "matches",
    "move_weights",
    "neighborhood_attention",
    "replace_module",
    "rms_norm",
    "rope",
    "row_calibrated",
    "row_scores",
    "row_values",
    "row_write",
    "scale_weights",
    "scored_decode_attention",
    "select",
    "self_gated_scan",
    "sparse_linear_attention",
    "swiglu",
    "taylor_linear_attention",
    "taylor_state_shape",
    "triton_backend",
]

__version__ = version("eff-kernels")

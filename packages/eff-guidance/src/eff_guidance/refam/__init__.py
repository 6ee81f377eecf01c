"""Pointing at what a phrase names, by the attention of a text-to-image model (RefAM, arXiv 2509.22650)."""

from eff_guidance.refam.capture import JointAttention, capture_joint_attention, default_blocks, text_share
from eff_guidance.refam.config import DEFAULT_MAGNETS, RefAMConfig
from eff_guidance.refam.encode import EncodedPrompt, encode_expression, encode_picture
from eff_guidance.refam.heatmap import box_of, grounding_heatmap, overlay, peaks, region_at, spatial_bias
from eff_guidance.refam.metrics import mean_iou, overall_iou, point_accuracy
from eff_guidance.refam.prompt import MagnetPrompt, add_magnets
from eff_guidance.refam.refer import ReferOutput, keep_tokens, refer
from eff_guidance.refam.segment import best_fit, sam_segmenter
from eff_guidance.refam.sinks import find_global_sinks

__all__ = [
    "DEFAULT_MAGNETS",
    "EncodedPrompt",
    "JointAttention",
    "MagnetPrompt",
    "RefAMConfig",
    "ReferOutput",
    "add_magnets",
    "best_fit",
    "box_of",
    "capture_joint_attention",
    "default_blocks",
    "encode_expression",
    "encode_picture",
    "find_global_sinks",
    "grounding_heatmap",
    "keep_tokens",
    "mean_iou",
    "overall_iou",
    "overlay",
    "peaks",
    "point_accuracy",
    "refer",
    "region_at",
    "sam_segmenter",
    "spatial_bias",
    "text_share",
]

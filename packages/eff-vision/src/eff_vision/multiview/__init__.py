"""Cameras and depth of many views in one pass: a transformer of VGGT's class, its loss, and the layers Lite3R swaps.

Wang and others, VGGT (arXiv 2503.11651); Lite3R (arXiv 2605.11354). Sparse-linear attention is in eff-attention, FP8 in
eff-quant; the recipe ``lite3r`` of eff-train joins them. Conventions: `eff_vision.geometry`; view 0 is the world.
"""

from eff_vision.multiview.config import MultiViewConfig, MultiViewLossConfig
from eff_vision.multiview.losses import MultiViewBatch, camera_loss, depth_loss, multiview_loss, normalize_scene
from eff_vision.multiview.model import MultiViewOutput, MultiViewTransformer
from eff_vision.multiview.targets import attention_layers, head_dims, projection_parameters

__all__ = [
    "MultiViewBatch",
    "MultiViewConfig",
    "MultiViewLossConfig",
    "MultiViewOutput",
    "MultiViewTransformer",
    "attention_layers",
    "camera_loss",
    "depth_loss",
    "head_dims",
    "multiview_loss",
    "normalize_scene",
    "projection_parameters",
]

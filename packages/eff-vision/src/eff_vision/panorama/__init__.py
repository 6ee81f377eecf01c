"""Segmentation, depth and normals of panoramas, learnt from teachers of perspective pictures.

MTPano: Multi-Task Panoramic Scene Understanding (arXiv 2602.05330), with half-pixel exact resampling and convolutions
that go around. Depth of panoramas is the distance along the ray. Conventions: `eff_vision.geometry`.
"""

from eff_vision.panorama.backbone import BackboneTaps
from eff_vision.panorama.bridge import GradientTruncatedBridge
from eff_vision.panorama.config import (
    AUXILIARY,
    IGNORE,
    INVARIANT,
    MAIN,
    VARIANT,
    PanoLossConfig,
    PatchConfig,
    PDBridgeConfig,
    stream_of,
)
from eff_vision.panorama.decoder import DPTNeck, TaskDecoder
from eff_vision.panorama.layers import ChannelNorm, PanoConv2d, blend_seam, circular_pad, resize_panorama, zero_conv
from eff_vision.panorama.losses import MultiTaskLoss, edge_term, frequency_term, known_pixels, segmentation_loss
from eff_vision.panorama.model import PanoOutput, PDBridgeNet
from eff_vision.panorama.patches import Patch, PatchLabels, PseudoLabeler, cube_patches, sample_patches, turn
from eff_vision.panorama.streams import ERPTokenMixer, GeometryModulatedBlock, InvariantBlock, StreamSplit
from eff_vision.panorama.targets import aux_targets, edge_distance, image_gradient, point_map

__all__ = [
    "AUXILIARY",
    "IGNORE",
    "INVARIANT",
    "MAIN",
    "VARIANT",
    "BackboneTaps",
    "ChannelNorm",
    "DPTNeck",
    "ERPTokenMixer",
    "GeometryModulatedBlock",
    "GradientTruncatedBridge",
    "InvariantBlock",
    "MultiTaskLoss",
    "PDBridgeConfig",
    "PDBridgeNet",
    "PanoConv2d",
    "PanoLossConfig",
    "PanoOutput",
    "Patch",
    "PatchConfig",
    "PatchLabels",
    "PseudoLabeler",
    "StreamSplit",
    "TaskDecoder",
    "aux_targets",
    "blend_seam",
    "circular_pad",
    "cube_patches",
    "edge_distance",
    "edge_term",
    "frequency_term",
    "image_gradient",
    "known_pixels",
    "point_map",
    "resize_panorama",
    "sample_patches",
    "segmentation_loss",
    "stream_of",
    "turn",
    "zero_conv",
]

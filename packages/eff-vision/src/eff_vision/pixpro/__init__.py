"""Dense self-supervised pre-training: cells of two crops that show the same place agree.

Xie and others, Propagate Yourself: Exploring Pixel-Level Consistency for Unsupervised Visual Representation Learning
(arXiv 2011.10043).
"""

from eff_vision.pixpro.cells import cell_centres, positive_mask
from eff_vision.pixpro.config import PixProConfig
from eff_vision.pixpro.encoder import CnnCells, PyramidCells, VitCells, export_backbone
from eff_vision.pixpro.fpn import FeaturePyramid
from eff_vision.pixpro.lars import LARS
from eff_vision.pixpro.losses import pixcontrast_loss, pixpro_loss
from eff_vision.pixpro.model import PixPro, PixProOutput
from eff_vision.pixpro.momentum import MomentumCopy, momentum_at
from eff_vision.pixpro.propagation import PixelPropagation
from eff_vision.pixpro.views import ByolAugment, TwoViews, random_flip, random_resized_crop

__all__ = [
    "LARS",
    "ByolAugment",
    "CnnCells",
    "FeaturePyramid",
    "MomentumCopy",
    "PixPro",
    "PixProConfig",
    "PixProOutput",
    "PixelPropagation",
    "PyramidCells",
    "TwoViews",
    "VitCells",
    "cell_centres",
    "export_backbone",
    "momentum_at",
    "pixcontrast_loss",
    "pixpro_loss",
    "positive_mask",
    "random_flip",
    "random_resized_crop",
]

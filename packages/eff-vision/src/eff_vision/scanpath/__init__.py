"""In which order people look at objects when they search for one.

OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction (arXiv 2407.13335). Metrics: `eff_vision.metrics`.
"""

from eff_vision.scanpath.config import OatConfig
from eff_vision.scanpath.model import PAD, OatOutput, ObjectScanpathTransformer
from eff_vision.scanpath.position import DistancePositionEncoding2D, gaussian_position_table
from eff_vision.scanpath.simulate import Shelf, make_shelves, simulate_searcher

__all__ = [
    "PAD",
    "DistancePositionEncoding2D",
    "OatConfig",
    "OatOutput",
    "ObjectScanpathTransformer",
    "Shelf",
    "gaussian_position_table",
    "make_shelves",
    "simulate_searcher",
]

"""Encoding models of visual cortex: learnt queries read a frozen backbone, one for each region of the brain.

Adeli, Sun and Kriegeskorte, Transformer brain encoders explain human high-level visual responses (arXiv 2505.17329).
"""

from eff_vision.backbones import FeatureGrid, FrozenFeatureExtractor
from eff_vision.brain_encoder.baselines import LinearConvEncoder, RidgeEncoder, SpatialFeatureEncoder
from eff_vision.brain_encoder.config import RoiQueryConfig
from eff_vision.brain_encoder.encoder import EncoderOutput, RoiQueryEncoder, attention_maps
from eff_vision.brain_encoder.fit import FitHistory, ensemble_predict, fit_encoder, layer_weights
from eff_vision.brain_encoder.metrics import encoding_accuracy, pearson_columns
from eff_vision.brain_encoder.rois import RoiMasks
from eff_vision.brain_encoder.simulate import SyntheticBrain, make_synthetic_brain
from eff_vision.positions import sine_position

__all__ = [
    "EncoderOutput",
    "FeatureGrid",
    "FitHistory",
    "FrozenFeatureExtractor",
    "LinearConvEncoder",
    "RidgeEncoder",
    "RoiMasks",
    "RoiQueryConfig",
    "RoiQueryEncoder",
    "SpatialFeatureEncoder",
    "SyntheticBrain",
    "attention_maps",
    "encoding_accuracy",
    "ensemble_predict",
    "fit_encoder",
    "layer_weights",
    "make_synthetic_brain",
    "pearson_columns",
    "sine_position",
]

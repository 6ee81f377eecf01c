"""Full masks of partly hidden objects in clips: slots that read the picture and a bird's-eye view through time.

Fan and others, Rethinking Amodal Video Segmentation from Learning Supervised Signals with Object-centric Representation
(EoRaS, arXiv 2309.13248). Unlike the official code, the intrinsics of a crop are those of the crop, cells behind the
camera see nothing, and all normalisation is over groups. Conventions: `eff_vision.geometry`.
"""

from eff_vision.amodal.config import AmodalLossConfig, BEVConfig, EoRaSConfig
from eff_vision.amodal.crops import adapt_intrinsics_to_crop, crop_frames, paste_masks, visible_box_track
from eff_vision.amodal.encoder import ConvEncoder, FeaturePyramid
from eff_vision.amodal.fusion import MultiViewFusion, ObjectAttention
from eff_vision.amodal.lift import BEVLift, kubric_intrinsics, tilt_towards_origin
from eff_vision.amodal.losses import amodal_loss, focal_loss
from eff_vision.amodal.meter import AmodalMeter, AmodalScores
from eff_vision.amodal.model import AmodalOutput, EoRaS, MaskDecoder
from eff_vision.amodal.track import AmodalTrack, predict_track

__all__ = [
    "AmodalLossConfig",
    "AmodalMeter",
    "AmodalOutput",
    "AmodalScores",
    "AmodalTrack",
    "BEVConfig",
    "BEVLift",
    "ConvEncoder",
    "EoRaS",
    "EoRaSConfig",
    "FeaturePyramid",
    "MaskDecoder",
    "MultiViewFusion",
    "ObjectAttention",
    "adapt_intrinsics_to_crop",
    "amodal_loss",
    "crop_frames",
    "focal_loss",
    "kubric_intrinsics",
    "paste_masks",
    "predict_track",
    "tilt_towards_origin",
    "visible_box_track",
]

"""Metrics, each with its averaging spelt out: segmentation, depth, normals, poses, point clouds, scanpaths."""

from eff_vision.metrics.depth import DepthScores, align_depth, depth_metrics
from eff_vision.metrics.normals import NormalScores, angle_between, normal_metrics
from eff_vision.metrics.points import PointScores, point_metrics
from eff_vision.metrics.pose import PoseScores, pose_metrics, umeyama
from eff_vision.metrics.segmentation import ConfusionMatrix

__all__ = [
    "ConfusionMatrix",
    "DepthScores",
    "NormalScores",
    "PointScores",
    "PoseScores",
    "align_depth",
    "angle_between",
    "depth_metrics",
    "normal_metrics",
    "point_metrics",
    "pose_metrics",
    "umeyama",
]

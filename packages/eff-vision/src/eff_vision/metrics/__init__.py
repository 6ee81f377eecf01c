"""Metrics, each with its averaging spelt out: segmentation, depth, normals, poses, point clouds, scanpaths."""

from eff_vision.metrics.depth import DepthScores, align_depth, depth_metrics
from eff_vision.metrics.normals import NormalScores, angle_between, normal_metrics
from eff_vision.metrics.points import PointScores, point_metrics
from eff_vision.metrics.pose import PoseScores, pose_metrics, umeyama
from eff_vision.metrics.scanpaths import (
    BehaviorStats,
    MultiMatchScores,
    behavior_stats,
    behavioral_delta,
    fixations_to_objects,
    mean_stats,
    multimatch,
    scanmatch,
    scanpath_edit_distance,
    sequence_score,
)
from eff_vision.metrics.segmentation import ConfusionMatrix

__all__ = [
    "BehaviorStats",
    "ConfusionMatrix",
    "DepthScores",
    "MultiMatchScores",
    "NormalScores",
    "PointScores",
    "PoseScores",
    "align_depth",
    "angle_between",
    "behavior_stats",
    "behavioral_delta",
    "depth_metrics",
    "fixations_to_objects",
    "mean_stats",
    "multimatch",
    "normal_metrics",
    "point_metrics",
    "pose_metrics",
    "scanmatch",
    "scanpath_edit_distance",
    "sequence_score",
    "umeyama",
]

"""How much each position of a text reaches the last one through all layers: masks as graphs, rollout, decay, reports.

Wu, Wang, Jegelka and Jadbabaie, On the Emergence of Position Bias in Transformers (arXiv 2502.01951).
"""

from eff_attention.position_bias.collect import collect_rollout
from eff_attention.position_bias.experiment import Draw, PositionBiasTask, position_gap, train_network
from eff_attention.position_bias.graphs import MaskSpec, centre_nodes, reach_depth
from eff_attention.position_bias.profiles import PositionProfile, position_profile
from eff_attention.position_bias.report import PositionBiasReport, position_bias_report
from eff_attention.position_bias.rollout import Rollout, attention_rollout, simulate_rollout
from eff_attention.position_bias.theory import convergence_bound, decay_profile, peak_distance

__all__ = [
    "Draw",
    "MaskSpec",
    "PositionBiasReport",
    "PositionBiasTask",
    "PositionProfile",
    "Rollout",
    "attention_rollout",
    "centre_nodes",
    "collect_rollout",
    "convergence_bound",
    "decay_profile",
    "peak_distance",
    "position_bias_report",
    "position_gap",
    "position_profile",
    "reach_depth",
    "simulate_rollout",
    "train_network",
]

"""Layers that reuse the choice of keys of an earlier layer (HyLRA, arXiv 2602.00777)."""

from eff_attention.layer_reuse.apply import apply_layer_reuse
from eff_attention.layer_reuse.blocks import ratio90
from eff_attention.layer_reuse.cache import growing_cache
from eff_attention.layer_reuse.config import LayerReuseConfig, Selector
from eff_attention.layer_reuse.pictures import plot_policy, plot_sensitivity
from eff_attention.layer_reuse.policy import LayerReusePolicy
from eff_attention.layer_reuse.profile import ReuseProfile, profile_layer_reuse
from eff_attention.layer_reuse.search import best_smallest, best_sources, fewest_resets, search_policy
from eff_attention.layer_reuse.selection import SelectedBlocks, select_blocks
from eff_attention.layer_reuse.selectors import pooled_mass

__all__ = [
    "LayerReuseConfig",
    "LayerReusePolicy",
    "ReuseProfile",
    "SelectedBlocks",
    "Selector",
    "apply_layer_reuse",
    "best_smallest",
    "best_sources",
    "fewest_resets",
    "growing_cache",
    "plot_policy",
    "plot_sensitivity",
    "pooled_mass",
    "profile_layer_reuse",
    "ratio90",
    "search_policy",
    "select_blocks",
]

"""Layers that reuse the choice of keys of an earlier layer (HyLRA, arXiv 2602.00777)."""

from eff_attention.layer_reuse.apply import apply_layer_reuse
from eff_attention.layer_reuse.choose import ChosenBlocks, choose_blocks
from eff_attention.layer_reuse.config import LayerReuseConfig
from eff_attention.layer_reuse.policy import LayerReusePolicy

__all__ = ["ChosenBlocks", "LayerReuseConfig", "LayerReusePolicy", "apply_layer_reuse", "choose_blocks"]

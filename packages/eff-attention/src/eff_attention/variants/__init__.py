"""Token mixers that relax one principle of attention each, and hybrids of them (arXiv 2510.11602)."""

from eff_attention.variants.build import (
    build_hybrid,
    load_hybrid,
    parameter_report,
    skip_layers,
    swap_layers_,
    variant_layers,
)
from eff_attention.variants.config import KINDS, AttentionVariantConfig
from eff_attention.variants.context import precompute_maps
from eff_attention.variants.indicators import Indicators, attention_indicators, attention_maps
from eff_attention.variants.layouts import LAYOUTS, standard_layers
from eff_attention.variants.mixers import (
    MLPMixer,
    SelfGatedSoftmax,
    StaticEmbAttention,
    StaticMapAttention,
    TaylorAttention,
    VariantMixer,
)

__all__ = [
    "KINDS",
    "LAYOUTS",
    "AttentionVariantConfig",
    "Indicators",
    "MLPMixer",
    "SelfGatedSoftmax",
    "StaticEmbAttention",
    "StaticMapAttention",
    "TaylorAttention",
    "VariantMixer",
    "attention_indicators",
    "attention_maps",
    "build_hybrid",
    "load_hybrid",
    "parameter_report",
    "precompute_maps",
    "skip_layers",
    "standard_layers",
    "swap_layers_",
    "variant_layers",
]

"""LoRA experts that are chosen token by token inside of attention and state-space projections (arXiv 2507.00029)."""

from eff_adapters.lora_mixer.apply import apply_lora_mixer
from eff_adapters.lora_mixer.config import LoraMixerConfig
from eff_adapters.lora_mixer.expert import FreshExpert, LoraExpert, LoraWeights
from eff_adapters.lora_mixer.layer import RoutedLoraLinear, Router
from eff_adapters.lora_mixer.load import load_lora_mixer
from eff_adapters.lora_mixer.losses import RoutingLoss, specialization_balance_loss
from eff_adapters.lora_mixer.mixer import LoraMixer, MixerLosses
from eff_adapters.lora_mixer.peft_files import read_adapter
from eff_adapters.lora_mixer.routing import Routes, router_logits, sparse_gates, straight_through_gates, top_routes
from eff_adapters.lora_mixer.stats import RouteStats
from eff_adapters.lora_mixer.training import cosine_with_warmup, init_routers_from_prompts

__all__ = [
    "FreshExpert",
    "LoraExpert",
    "LoraMixer",
    "LoraMixerConfig",
    "LoraWeights",
    "MixerLosses",
    "RouteStats",
    "RoutedLoraLinear",
    "Router",
    "Routes",
    "RoutingLoss",
    "apply_lora_mixer",
    "cosine_with_warmup",
    "init_routers_from_prompts",
    "load_lora_mixer",
    "read_adapter",
    "router_logits",
    "sparse_gates",
    "specialization_balance_loss",
    "straight_through_gates",
    "top_routes",
]

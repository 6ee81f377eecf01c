"""Guidance by damaged attention heads: SoftPAG and HeadHunter (arXiv 2506.10978)."""

from typing import TYPE_CHECKING, Any

from eff_guidance.head_guidance.algebra import guide, guide_with_cfg, in_window
from eff_guidance.head_guidance.apply import PerturbationHandle, apply_head_perturbation, perturbed_heads
from eff_guidance.head_guidance.config import Path, SoftPAGConfig, Target
from eff_guidance.head_guidance.heads import Head, Layer, heads_of_layers, list_heads, list_layers
from eff_guidance.head_guidance.headset import HeadHunterConfig, HeadSet, Round
from eff_guidance.head_guidance.hunter import HeadHunter, harmonic, pipeline_generator
from eff_guidance.head_guidance.pipelines import GuidanceHandle, apply_head_guidance
from eff_guidance.head_guidance.softpag import soft_perturb_attention

if TYPE_CHECKING:
    from eff_guidance.head_guidance.guider import SoftPAGGuidance

__all__ = [
    "GuidanceHandle",
    "Head",
    "HeadHunter",
    "HeadHunterConfig",
    "HeadSet",
    "Layer",
    "Path",
    "PerturbationHandle",
    "Round",
    "SoftPAGConfig",
    "SoftPAGGuidance",
    "Target",
    "apply_head_guidance",
    "apply_head_perturbation",
    "guide",
    "guide_with_cfg",
    "harmonic",
    "heads_of_layers",
    "in_window",
    "list_heads",
    "list_layers",
    "perturbed_heads",
    "pipeline_generator",
    "soft_perturb_attention",
]


def __getattr__(name: str) -> Any:
    """`SoftPAGGuidance` imports diffusers, and only when it is asked for."""
    if name == "SoftPAGGuidance":
        from eff_guidance.head_guidance.guider import SoftPAGGuidance

        return SoftPAGGuidance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Several concepts learnt from one picture and kept apart by their attention (AttenCraft, arXiv 2405.17965)."""

from eff_guidance.attencraft.adapter import ConceptAdapter, apply_concepts
from eff_guidance.attencraft.config import AttenCraftConfig, Concept
from eff_guidance.attencraft.losses import attention_js_loss, js_divergence, masked_denoising_loss
from eff_guidance.attencraft.maps import normalize_map, refine_maps, resize_map
from eff_guidance.attencraft.masks import MaskKeeper, make_concept_masks, split_masks, ssim, tie_masks_to_tokens
from eff_guidance.attencraft.projections import ConceptLinear, train_projections
from eff_guidance.attencraft.reading import Reader, Reading, reader_of
from eff_guidance.attencraft.sampler import ConceptSampler, Draw
from eff_guidance.attencraft.store import AttentionStore, map_sizes
from eff_guidance.attencraft.trainer import AttenCraftTrainer, StepReport, encode_latents
from eff_guidance.attencraft.words import NewWords, add_words, spans

__all__ = [
    "AttenCraftConfig",
    "AttenCraftTrainer",
    "AttentionStore",
    "Concept",
    "ConceptAdapter",
    "ConceptLinear",
    "ConceptSampler",
    "Draw",
    "MaskKeeper",
    "NewWords",
    "Reader",
    "Reading",
    "StepReport",
    "add_words",
    "apply_concepts",
    "attention_js_loss",
    "encode_latents",
    "js_divergence",
    "make_concept_masks",
    "map_sizes",
    "masked_denoising_loss",
    "normalize_map",
    "reader_of",
    "refine_maps",
    "resize_map",
    "spans",
    "split_masks",
    "ssim",
    "tie_masks_to_tokens",
    "train_projections",
]

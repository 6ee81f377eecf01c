"""Projection heads: which layer of a self-supervised model to keep, and a fixed head in place of a trained one.

Xue and others, Investigating the Benefits of Projection Head for Representation Learning (arXiv 2403.11391).
"""

from eff_vision.projection_head.diagnostics import Evenness, HeadComparison, compare_pre_post, evenness, probe
from eff_vision.projection_head.heads import (
    HeadedEncoder,
    HeadOutput,
    IdentityInitHead,
    MLPHead,
    ReweightingHead,
    SymmetricReLU,
    choose_kappa,
)
from eff_vision.projection_head.losses import barlow_twins, nt_xent, spectral_contrastive_loss, supcon
from eff_vision.projection_head.theory import (
    feature_weights,
    optimal_linear_weights,
    population_loss,
    population_minimum,
)

__all__ = [
    "Evenness",
    "HeadComparison",
    "HeadOutput",
    "HeadedEncoder",
    "IdentityInitHead",
    "MLPHead",
    "ReweightingHead",
    "SymmetricReLU",
    "barlow_twins",
    "choose_kappa",
    "compare_pre_post",
    "evenness",
    "feature_weights",
    "nt_xent",
    "optimal_linear_weights",
    "population_loss",
    "population_minimum",
    "probe",
    "spectral_contrastive_loss",
    "supcon",
]

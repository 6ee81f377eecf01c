"""One attention layer of many frozen random heads, fitted in closed form (arXiv 2307.11353).

`RandomFeatureAttention` needs torch alone; the estimators need the extra ``sklearn`` and are imported when first named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from eff_attention.random_features.features import arc_cosine, attention_features, attention_kernel
from eff_attention.random_features.module import RandomFeatureAttention
from eff_attention.random_features.sampling import HeadWeights, sample_heads

if TYPE_CHECKING:
    from eff_attention.random_features.curve import CurvePoint, sample_complexity_curve
    from eff_attention.random_features.estimators import (
        RandomFeatureAttentionClassifier,
        RandomFeatureAttentionRegressor,
    )
    from eff_attention.random_features.kernel_ridge import RFAKernelRidge
    from eff_attention.random_features.targets import TARGETS, RandomFeatureMLPRegressor, sample_sets

_NEED_SKLEARN = {
    "CurvePoint": "curve",
    "RFAKernelRidge": "kernel_ridge",
    "RandomFeatureAttentionClassifier": "estimators",
    "RandomFeatureAttentionRegressor": "estimators",
    "RandomFeatureMLPRegressor": "targets",
    "TARGETS": "targets",
    "sample_complexity_curve": "curve",
    "sample_sets": "targets",
}

__all__ = [
    "TARGETS",
    "CurvePoint",
    "HeadWeights",
    "RFAKernelRidge",
    "RandomFeatureAttention",
    "RandomFeatureAttentionClassifier",
    "RandomFeatureAttentionRegressor",
    "RandomFeatureMLPRegressor",
    "arc_cosine",
    "attention_features",
    "attention_kernel",
    "sample_complexity_curve",
    "sample_heads",
    "sample_sets",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_SKLEARN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_NEED_SKLEARN[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise ImportError(f'{name} needs scikit-learn: pip install "eff-attention[sklearn]"') from error

"""Vision models, losses, geometry and metrics, one sub-package a method: `eff_vision.geometry`, `eff_vision.metrics`.

Importing this package loads torch and nothing larger; transformers and scikit-learn are imported by the functions that
need them.
"""

from eff_vision import geometry, metrics

__all__ = ["geometry", "metrics"]

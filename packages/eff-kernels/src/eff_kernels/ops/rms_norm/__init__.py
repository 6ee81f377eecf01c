"""Root mean square normalisation, with or without a residual addition before it."""

from eff_kernels.ops.rms_norm.api import AddRMSNorm, add_rms_norm, rms_norm

__all__ = ["AddRMSNorm", "add_rms_norm", "rms_norm"]

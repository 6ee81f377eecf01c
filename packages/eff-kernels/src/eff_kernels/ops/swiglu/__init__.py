"""SwiGLU: the gated activation of Llama-type feed-forward layers."""

from eff_kernels.ops.swiglu.api import swiglu

__all__ = ["swiglu"]

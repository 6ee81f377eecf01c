"""SwiGLU in plain PyTorch, the truth that every backend is held to; in float32, or float64 for float64 inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.swiglu.args import Args, BackwardArgs


def swiglu(*args: *Args) -> Tensor:
    """Give gate * sigmoid(gate) * up (Shazeer 2020, equation 6), rounded once to ``gate.dtype``."""
    gate, up = args
    wide = torch.promote_types(gate.dtype, torch.float32)
    x = gate.to(wide)
    return (x * x.sigmoid() * up.to(wide)).to(gate.dtype).contiguous()


def swiglu_backward(*args: *BackwardArgs) -> tuple[Tensor, Tensor]:
    """Gradients to gate and up. With s = sigmoid(gate): grad * up * s * (1 + gate * (1 - s)) and grad * gate * s."""
    grad, gate, up = args
    wide = torch.promote_types(gate.dtype, torch.float32)
    g, x, u = grad.to(wide), gate.to(wide), up.to(wide)
    s = x.sigmoid()
    to_gate, to_up = g * u * s * (1 + x * (1 - s)), g * x * s
    return to_gate.to(gate.dtype).contiguous(), to_up.to(gate.dtype).contiguous()

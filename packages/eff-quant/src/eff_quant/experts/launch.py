"""All experts in one launch of a Triton kernel, where there is a GPU for it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from eff_kernels.op import triton_interprets
from torch import Tensor
from torch.autograd.function import once_differentiable

from eff_quant.experts.route import expert_of_rows
from eff_quant.layer import StackedCodes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_launch(x: Tensor, config: Any) -> bool:
    """Whether the kernel for all experts takes these inputs under these settings.

    It is part of the backend "triton" of the ops: taken on GPUs unless another backend is asked for, and on a CPU under
    Triton's interpreter if this one is.
    """
    if config.backend not in ("auto", "triton") or x.dtype not in DTYPES:
        return False
    if config.out_dtype is not None and config.out_dtype not in DTYPES:
        return False
    there = x.is_cuda or (x.is_cpu and config.backend == "triton" and triton_interprets())
    return there and importlib.util.find_spec("triton") is not None


def sort(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the choices of all tokens by expert, without a word from the device to the host.

    Args:
        ids: Experts of each token, integers [T, k]. What is not below ``experts`` stands for no expert.
        experts: E.

    Returns:
        Places of the flattened choices, sorted by expert, int64 [T * k], those without an expert last; and where the
        run of each expert begins and the last ends, int32 [E + 1].
    """
    flat = ids.reshape(-1).clamp(max=experts)
    order = flat.argsort(stable=True)
    edges = torch.arange(experts + 1, device=ids.device, dtype=flat.dtype)
    return order, torch.searchsorted(flat[order], edges, out_int32=True)


class ExpertProduct(torch.autograd.Function):
    """Sorted rows [S, K] times the weight of their expert, plus its bias; codes get no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, codes: StackedCodes, offsets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See `eff_quant.experts.triton.forward`."""
        from eff_quant.experts import triton

        ctx.codes, ctx.like, ctx.bias = codes, (x.size(1), x.dtype), bias if bias is None else bias.dtype
        ctx.save_for_backward(offsets)
        return triton.forward(x, codes, offsets, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through the rounding of x, as the single layers do it."""
        from eff_quant.experts import triton

        (offsets,) = ctx.saved_tensors
        x = triton.backward(grad, ctx.codes, offsets, *ctx.like) if ctx.needs_input_grad[0] else None
        bias = None
        if ctx.needs_input_grad[1]:
            sums = torch.zeros(len(offsets), grad.size(1), device=grad.device)
            sums.index_add_(0, expert_of_rows(offsets, len(grad)), grad.float())
            bias = sums[:-1].to(ctx.bias)
        return x, bias, None, None, None

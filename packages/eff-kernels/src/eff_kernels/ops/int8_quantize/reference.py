"""Row-wise int8 quantisation in plain PyTorch (LLM.int8(), sections 2 and 3); columns are rows of the transpose."""

from __future__ import annotations

import torch
from torch import Tensor

from eff_kernels.ops.int8_quantize.args import Args


def quantize_rows(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, K], absmax [T] and a flag for each outlier column [K] of x [T, K]."""
    x, threshold = args
    x = x.float()
    outlier = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    inlier = x.masked_fill(outlier, 0.0)
    absmax = inlier.abs().amax(1) if x.size(1) else x.new_zeros(x.size(0))
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)  # no code stands for inf or NaN: the row becomes NaN
    columns = outlier.any(0)
    codes = (inlier * inverse_scale(absmax)[:, None]).round().masked_fill(columns, 0.0)
    return codes.nan_to_num(0.0).to(torch.int8), absmax, columns


def quantize_columns(*args: *Args) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [T, K], absmax [K] and a flag for each outlier column [K] of x [T, K].

    As for rows, entries that reach the threshold count for no absmax and outlier columns have codes of 0.
    """
    x, threshold = args
    x = x.float()
    outlier = x.abs() >= threshold if threshold > 0 else torch.zeros_like(x, dtype=torch.bool)
    inlier = x.masked_fill(outlier, 0.0)
    absmax = inlier.abs().amax(0) if x.size(0) else x.new_zeros(x.size(1))
    absmax = torch.where(absmax.isfinite(), absmax, torch.nan)
    columns = outlier.any(0)
    codes = (inlier * inverse_scale(absmax)).round().masked_fill(columns, 0.0)
    return codes.nan_to_num(0.0).to(torch.int8), absmax, columns


def inverse_scale(absmax: Tensor) -> Tensor:
    """127 / absmax, with 0 where absmax is 0 (a row of zeros) or NaN: its codes are 0.

    PyTorch computes it as 127 * (1 / absmax); so does every backend, for equal codes, and so does bitsandbytes.
    """
    return torch.where(absmax > 0, 127.0 / absmax.where(absmax > 0, 1.0), 0.0)

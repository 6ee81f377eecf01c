"""LLM.int8() as `quantize_` and transformers' loader see it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eff_quant.linears import Found
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.layer import Int8Linear
from eff_quant.method import Method


def _empty(name: str, linear: nn.Module, config: Int8Config, device: torch.device | str | None) -> nn.Module:
    columns = config.outlier_columns.get(name, ())
    return Int8Linear.empty_like(linear, config, outlier_columns=columns, device=device)


def _tensors(name: str, weight: Tensor, config: Int8Config, shared: None) -> dict[str, Tensor]:
    return Int8Linear.quantized_tensors(weight, config.outlier_columns.get(name, ()))


def _check_outlier_columns(config: Int8Config, found: Sequence[Found]) -> None:
    """Check that each module with static outlier columns is one that gets quantised with them.

    Raises:
        ValueError: one is not; the message names it and the reason.
    """
    reasons = {name: f.reason for f in found for name in f.names}
    for name in config.outlier_columns:
        reason = reasons.get(name, "the model has no linear layer of that name")
        if reason:
            raise ValueError(f"outlier_columns names {name!r}, which is not quantised: {reason}")


def _rebuild(name: str, linear: nn.Module, old: Int8Linear) -> nn.Module:
    columns = () if old.outlier_columns is None else old.outlier_columns.tolist()
    new = Int8Linear.from_linear(linear, old.config, outlier_columns=columns)
    if new.outlier_weight is not None and old.outlier_weight is not None:
        new.outlier_weight = new.outlier_weight.to(old.outlier_weight.dtype)
    return new


METHOD = Method(
    config=Int8Config,
    layer=Int8Linear,
    empty=_empty,
    tensors=_tensors,
    check=_check_outlier_columns,
    rebuild=_rebuild,
    bytes_per_weight=lambda config: 1.0,
    compilable=lambda config: config.threshold == 0,
)

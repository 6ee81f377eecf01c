"""LLM.int8() as `quantize_` and the loaders see it."""

from __future__ import annotations

from collections.abc import Sequence

from eff_quant.linears import Found
from eff_quant.llm_int8.bnb import load_bnb_int8, stored_int8
from eff_quant.llm_int8.config import Int8Config
from eff_quant.llm_int8.layer import Int8Linear
from eff_quant.method import Method
from eff_quant.registry import register


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


def _experts(name: str, config: Int8Config) -> str:
    """Static outlier columns are found for one matrix, and each expert has two."""
    if columns := config.outlier_columns.get(name):
        return f"has outlier_columns={columns}, which stacked experts do not have; leave it out of outlier_columns"
    return ""


METHOD = register(
    Method(
        config=Int8Config,
        layer=Int8Linear,
        experts=_experts,
        more=lambda name, config: {"outlier_columns": config.outlier_columns.get(name, ())},
        check=_check_outlier_columns,
        bytes_per_weight=lambda config: 1.0,
        compilable=lambda config: config.threshold == 0,
        reads=lambda settings: bool(settings.get("load_in_8bit")),
        stored=stored_int8,
        read=load_bnb_int8,
    )
)

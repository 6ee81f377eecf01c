"""Test tools for kernels: error budgets, sample inputs, the op test base and the benchmark recorder.

`eff_kernels.testing.op_tests` needs pytest and is imported by its full name.
"""

from eff_kernels.testing.budget import assert_within_budget, compare, to_float64, within_budget
from eff_kernels.testing.intervals import mean_interval
from eff_kernels.testing.records import Provider, Record, Recorder, environment, load_records, measure, rotating, same
from eff_kernels.testing.sizes import weight_bytes
from eff_kernels.testing.specs import (
    NON_CONTIGUOUS,
    Draw,
    Spec,
    padded_rows,
    strided_columns,
    swapped_dims,
)
from eff_kernels.testing.tables import ratio_table

__all__ = [
    "NON_CONTIGUOUS",
    "Draw",
    "Provider",
    "Record",
    "Recorder",
    "Spec",
    "assert_within_budget",
    "compare",
    "environment",
    "load_records",
    "mean_interval",
    "measure",
    "padded_rows",
    "ratio_table",
    "rotating",
    "same",
    "strided_columns",
    "swapped_dims",
    "to_float64",
    "weight_bytes",
    "within_budget",
]

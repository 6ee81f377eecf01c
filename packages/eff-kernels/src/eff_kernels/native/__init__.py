"""The compiled CPU kernels: C sources, built on first use with whatever compiler is there, called through ctypes."""

from eff_kernels.native.build import NativeBuildError, library, unavailable
from eff_kernels.native.call import (
    DTYPE_CODES,
    fallible,
    loader,
    loader_by_name,
    rows_of,
    struct_kernel,
    threads_for,
    unfit,
)

__all__ = [
    "DTYPE_CODES",
    "NativeBuildError",
    "fallible",
    "library",
    "loader",
    "loader_by_name",
    "rows_of",
    "struct_kernel",
    "threads_for",
    "unavailable",
    "unfit",
]

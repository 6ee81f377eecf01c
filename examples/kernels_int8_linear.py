"""An op by itself: quantise a weight matrix to int8, multiply by it, and ask which backend ran and why.

uv run examples/kernels_int8_linear.py
"""

import torch
from eff_kernels import BackendError, int8_linear, int8_quantize_rows

torch.manual_seed(0)
weight = torch.randn(1024, 1024)
x = torch.randn(8, 1024)
stored = int8_quantize_rows(weight)  # a byte a weight, one scale a row

y = int8_linear(x, stored.codes, stored.absmax)
exact = x @ weight.T
print(f"weights: {weight.nbytes // 1024} KiB in float32, {stored.codes.nbytes // 1024} KiB in int8")
print(f"relative error: {float((y - exact).norm() / exact.norm()):.4f}")

try:  # a backend that is asked for by name runs or says why it cannot
    int8_linear(x, stored.codes, stored.absmax, backend="triton")
except BackendError as error:
    print(f"triton: {error}")

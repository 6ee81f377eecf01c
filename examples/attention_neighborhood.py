"""Neighborhood attention on a picture's tokens: the cost grows with the window, not with the picture.

uv run examples/attention_neighborhood.py
"""

import time

import torch
import torch.nn.functional as F
from eff_attention import na2d

torch.manual_seed(0)
for side in (16, 32, 64):
    q, k, v = (torch.randn(1, side, side, 4, 32) for _ in range(3))  # [batch, height, width, heads, head_dim]
    start = time.perf_counter()
    near = na2d(q, k, v, kernel_size=7)
    middle = time.perf_counter()
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    F.scaled_dot_product_attention(*flat)
    end = time.perf_counter()
    print(f"{side} x {side}: window {middle - start:.4f} s, all tokens {end - middle:.4f} s, output {list(near.shape)}")

row = na2d(q, k, v, kernel_size=7, dilation=(1, 4), is_causal=(True, False))  # other reach in each direction
assert row.shape == q.shape

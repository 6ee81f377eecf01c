"""What the Triton kernels of neighborhood attention share: places in a box, windows, loads of rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(box, L0, L1, L2, D0, D1, D2, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, B: tl.constexpr):
    """Residue, places of the box's tokens and number of places in the dilation group, for each axis."""
    each0, each1, each2 = tl.cdiv(tl.cdiv(L0, D0), T0), tl.cdiv(tl.cdiv(L1, D1), T1), tl.cdiv(tl.cdiv(L2, D2), T2)
    box2, box1, box0 = box % (D2 * each2), box // (D2 * each2) % (D1 * each1), box // (D2 * each2) // (D1 * each1)
    lane = tl.arange(0, B)
    g0, g1, g2 = box0 // each0, box1 // each1, box2 // each2
    p0 = box0 % each0 * T0 + lane // (T1 * T2)
    p1 = box1 % each1 * T1 + lane // T2 % T1
    p2 = box2 % each2 * T2 + lane % T2
    return g0, p0, (L0 - g0 + D0 - 1) // D0, g1, p1, (L1 - g1 + D1 - 1) // D1, g2, p2, (L2 - g2 + D2 - 1) // D2


@triton.jit
def window(p, n, K, S, CAUSAL: tl.constexpr):
    """First and last key of the queries at places p of a dilation group of n."""
    start = p // S * S
    if CAUSAL:
        lo = tl.maximum(tl.minimum(start + S - 1, n - 1) - K + 1, 0)
        hi = p
    else:
        lo = tl.minimum(tl.maximum(tl.minimum(start + S // 2, n - 1) - K // 2, 0), n - K)
        hi = lo + K - 1
    return lo, hi


@triton.jit
def span(lo, hi, valid):
    """First and last key that any valid query sees; an empty span where there is none."""
    return tl.min(tl.where(valid, lo, 1 << 30), 0), tl.max(tl.where(valid, hi, -1), 0)


@triton.jit
def queries(p, n, valid, K, S, CAUSAL: tl.constexpr):
    """First and last place of the queries that may see any of the valid keys at places p; a few of them may not."""
    first, last = span(p, p, valid)
    if CAUSAL:
        lo, hi = first, last + K - 1
    else:  # windows that a border moved inwards reach further
        lo = tl.where(first < K, 0, first - (K - 1 - K // 2) - (S - 1))
        hi = tl.where(last >= n - K, n - 1, last + K // 2 + S - 1)
    return tl.maximum(lo, 0), tl.where(last < 0, -1, tl.minimum(hi, n - 1))


@triton.jit
def size(a0, b0, a1, b1, a2, b2):
    """Number of places from a to b."""
    return tl.maximum(b0 - a0 + 1, 0) * tl.maximum(b1 - a1 + 1, 0) * tl.maximum(b2 - a2 + 1, 0)


@triton.jit
def inside_box(c, a0, a1, a2, b1, b2):
    """Places of element c of the box that begins at a and ends at b."""
    n1, n2 = tl.maximum(b1 - a1 + 1, 1), tl.maximum(b2 - a2 + 1, 1)
    return c // n2 // n1 + a0, c // n2 % n1 + a1, c % n2 + a2


@triton.jit
def token(p0, p1, p2, g0, g1, g2, D0, D1, D2, L1, L2):
    """Flat index of the token at the places p."""
    return ((p0 * D0 + g0).to(tl.int64) * L1 + p1 * D1 + g1) * L2 + p2 * D2 + g2


@triton.jit
def seen(x, y, z, lo0, hi0, lo1, hi1, lo2, hi2):
    """Whether the keys at (x, y, z) are in the windows."""
    return (x >= lo0) & (x <= hi0) & (y >= lo1) & (y <= hi1) & (z >= lo2) & (z <= hi2)


@triton.jit
def rows(ptr, row, width, feature, exists, WIDEN: tl.constexpr):
    """Rows of a tensor [rows, width]; zeros where there is none."""
    x = tl.load(ptr + row[:, None] * width + feature[None, :], exists[:, None] & (feature < width)[None, :], other=0.0)
    if WIDEN:
        x = x.to(tl.float32)
    return x

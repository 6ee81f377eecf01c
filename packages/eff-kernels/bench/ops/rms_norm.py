"""Benchmark of rms_norm and add_rms_norm: ``python packages/eff-kernels/bench/ops/rms_norm.py --threads 1``."""

import _rows
import torch
import torch.nn.functional as F
from eff_kernels import add_rms_norm, rms_norm
from eff_kernels.ops.rms_norm import api, reference
from eff_kernels.ops.rms_norm.specs import BENCH_SPECS, with_residual

SOURCES = ("ops/rms_norm", "native/src/rms_norm.c")


def eager(x, weight):
    """As transformers writes it for Llama."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def eager_add(x, residual, weight):
    total = x + residual
    return eager(total, weight), total


def peer(x, weight):
    return F.rms_norm(x, (x.size(-1),), weight, 1e-6)


def peer_add(x, residual, weight):
    total = x + residual
    return peer(total, weight), total


_rows.main(
    _rows.Case(
        op=api.OP,
        ours=rms_norm,
        reference=lambda x, weight: reference.rms_norm(x, weight, 1e-6),
        eager=eager,
        peers={"F.rms_norm": peer},
        specs=BENCH_SPECS,
        sources=SOURCES,
        gradients=(0, 1),
    ),
    _rows.Case(
        op=api.ADD_OP,
        ours=add_rms_norm,
        reference=lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, 1e-6),
        eager=eager_add,
        peers={"add, F.rms_norm": peer_add},
        specs=[with_residual(s) for s in BENCH_SPECS],
        sources=SOURCES,
        gradients=(0, 1, 2),
    ),
)

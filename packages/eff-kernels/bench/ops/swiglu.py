"""Benchmark of swiglu on the halves of a fused projection: ``python packages/eff-kernels/bench/ops/swiglu.py``."""

import _rows
import torch
import torch.nn.functional as F
from eff_kernels import swiglu
from eff_kernels.ops.swiglu import api, reference
from eff_kernels.ops.swiglu.specs import BENCH_SPECS


def eager(gate, up):
    return gate * torch.sigmoid(gate) * up


def peer(gate, up):
    return F.silu(gate) * up


_rows.main(
    _rows.Case(
        op=api.OP,
        ours=swiglu,
        reference=reference.swiglu,
        eager=eager,
        peers={"F.silu": peer},
        specs=BENCH_SPECS,
        sources=("ops/swiglu", "native/src/swiglu.c"),
        gradients=(0, 1),
    )
)

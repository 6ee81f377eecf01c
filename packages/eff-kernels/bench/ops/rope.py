"""Benchmark of rope: ``python packages/eff-kernels/bench/ops/rope.py --threads 1``. x holds queries and keys."""

import _rows
import torch
from eff_kernels import rope
from eff_kernels.ops.rope import api, reference
from eff_kernels.ops.rope.specs import BENCH_SPECS


def doubled(cos, sin):
    return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)


def eager(x, cos, sin):
    cos, sin = (t.unsqueeze(1).to(x.dtype) for t in doubled(cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def peers():
    try:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    except ImportError as error:
        print(f"transformers is left out: {error}")
        return {}

    def transformers(x, cos, sin):
        queries = x.size(1) * 3 // 4
        cos, sin = (t.to(x.dtype) for t in doubled(cos, sin))
        return torch.cat(apply_rotary_pos_emb(x[:, :queries], x[:, queries:], cos, sin), 1)

    return {"transformers": transformers}


_rows.main(
    _rows.Case(
        op=api.OP,
        ours=rope,
        reference=lambda x, cos, sin: reference.rope(x, cos, sin, False, False),
        eager=eager,
        peers=peers(),
        specs=BENCH_SPECS,
        sources=("ops/rope", "native/src/rope.c"),
        gradients=(0,),
    )
)

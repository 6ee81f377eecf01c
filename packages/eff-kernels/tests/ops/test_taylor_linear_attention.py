import pytest
import torch
from eff_kernels import taylor_linear_attention
from eff_kernels.ops.taylor_linear_attention import api, chunks, reference
from eff_kernels.ops.taylor_linear_attention.specs import SPECS
from eff_kernels.testing.op_tests import OpTests


class TestTaylorLinearAttention(OpTests):
    function = staticmethod(taylor_linear_attention)
    reference = staticmethod(reference.taylor_linear_attention)
    op = api.OP
    specs = SPECS
    differentiable = ("q", "k", "v")

    def schema_args(self, spec, args):
        q, k, v, mask = args
        options = spec.kwargs
        chunk = options.get("chunk_size") or chunks.pick_chunk(q.size(2), q.size(3), v.size(3))
        scale = options.get("scale", q.size(-1) ** -0.5)
        return q, k, v, mask, chunk, scale, None, options.get("return_state", False)

    def expected(self, schema_args):
        return tuple((r[0], r[2] if schema_args[-1] else None) for r in super().expected(schema_args))

import pytest
import torch
from eff_kernels import self_gated_scan
from eff_kernels.ops.self_gated_scan import api, reference
from eff_kernels.ops.self_gated_scan.specs import SPECS
from eff_kernels.testing.op_tests import OpTests


class TestSelfGatedScan(OpTests):
    function = staticmethod(self_gated_scan)
    reference = staticmethod(reference.self_gated_scan)
    op = api.OP
    specs = SPECS
    differentiable = ("score", "v")

    def expected(self, schema_args):
        return tuple(keep_public(r, schema_args[-1]) for r in super().expected(schema_args))


def keep_public(results, return_state):
    out, _, _, state = results
    return out, state if return_state else None

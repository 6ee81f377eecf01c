import inspect

import pytest
import torch
from eff_kernels import fp4_dequantize, fp4_linear, fp4_quantize
from eff_kernels.ops.fp4_linear import api, reference
from eff_kernels.ops.fp4_linear.specs import SPECS
from eff_kernels.testing.op_tests import OpTests

SCHEMA = (
    "x", "packed", "scale", "global_scale", "bias", "input_global_scale", "format", "activations", "scale_rounding",
    "out_dtype",
)  # fmt: skip


class TestFP4Linear(OpTests):
    function = staticmethod(fp4_linear)
    reference = staticmethod(reference.fp4_linear)
    op = api.OP
    specs = SPECS
    differentiable = ("x", "bias")

    def schema_args(self, spec, args):
        bound = inspect.signature(fp4_linear).bind(*args, **spec.kwargs)
        bound.apply_defaults()
        values = dict(bound.arguments)
        values["scale"] = values["scale"].view(torch.uint8)
        values["out_dtype"] = values["x"].dtype
        return tuple(values[name] for name in SCHEMA)

    def expected_gradients(self, schema_args, cotangents):
        """Straight through the rounding of x: as if the activations were left as they are."""
        return super().expected_gradients((*schema_args[:7], "none", *schema_args[8:]), cotangents)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    weight = torch.tensor([[6.0, -4.0, 3.0, 2.0] + [0.5] * 12, [6.0] * 16]).repeat(1, 2)
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0] + [2.0] * 28])
    for format in ("nvfp4", "mxfp4"):
        codes = fp4_quantize(weight, format, global_scale=torch.ones(1) if format == "nvfp4" else None)
        assert fp4_linear(x, *codes, torch.tensor([0.5, 1.0]), format=format).tolist() == [[45.5, 361.0]]


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_dynamic_activations_are_those_of_fp4_quantize(format):
    x, codes = draw(2, 3, 64), fp4_quantize(draw(10, 64, seed=1), format)
    rounded = fp4_dequantize(fp4_quantize(x, format), format)
    y = fp4_linear(x, *codes, format=format, activations="dynamic")
    assert torch.equal(y, fp4_linear(rounded, *codes, format=format))
    assert y.shape == (2, 3, 10)

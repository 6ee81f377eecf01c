import math

import pytest
import torch
from eff_kernels import FP4Codes, fp4_dequantize, fp4_quantize
from eff_kernels.ops.fp4_quantize import reference

BACKENDS = ["reference"]
MODES = ["floor", "even", "ceil", "rceil"]
ONE = torch.ones(())
WORKED = [6, -4, 3, 2, 1.5, -1, 0.5, 0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.3]
WORKED_BYTES = "e745a30120426496"
WORKED_VALUES = [6, -4, 3, 2, 1.5, -1, 0.5, 0, 0, 1, 1, 2, 2, 4, 4, -0.5]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def block(*values, size=32):
    return torch.tensor([*values, *[0.0] * (size - len(values))])


def bits_equal(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_codes_and_values(backend):
    """A block whose largest magnitude is 6 has scale 1 in either format."""
    every = torch.arange(16, dtype=torch.uint8)
    packed = reference.pack(every)
    one = torch.tensor([56], dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = fp4_dequantize(FP4Codes(packed, one, ONE), "nvfp4")
    assert bits_equal(values, torch.tensor(reference.VALUES))
    assert values[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(fp4_quantize(values, "nvfp4", global_scale=ONE, backend=backend).packed, packed)
    twice = fp4_quantize(values.repeat(2), "mxfp4", backend=backend)
    assert torch.equal(twice.packed, packed.repeat(2))
    assert twice.scale.tolist() == [127]


@pytest.mark.parametrize(
    ("x", "value"),
    [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0), (5.0001, 6.0),
     (-0.25, -0.0), (0.2500001, 0.5), (0.7499999, 0.5), (-3.5, -4.0), (-0.0, -0.0)],
)  # fmt: skip
def test_ties_go_to_the_even_mantissa(backend, x, value):
    for format, s_g in (("nvfp4", ONE), ("mxfp4", None)):
        codes = fp4_quantize(block(6.0, x), format, global_scale=s_g, backend=backend)
        assert bits_equal(fp4_dequantize(codes, format)[1], torch.tensor(value))


@pytest.mark.parametrize("x", [7.0, 100.0, float("inf")])
def test_what_is_beyond_the_largest_scale_saturates(backend, x):
    codes = fp4_quantize(block(448 * x, 6 * 448, size=16), "nvfp4", global_scale=ONE, backend=backend)
    assert fp4_dequantize(codes, "nvfp4")[:2].tolist() == [6 * 448, 6 * 448]


def test_worked_block(backend):
    x = torch.tensor(WORKED)
    codes = fp4_quantize(x, "nvfp4", global_scale=ONE, backend=backend)
    assert codes.scale.view(torch.uint8).tolist() == [56]
    assert bytes(codes.packed.tolist()).hex() == WORKED_BYTES
    assert fp4_dequantize(codes, "nvfp4").tolist() == WORKED_VALUES
    codes = fp4_quantize(torch.cat((x / 4, torch.zeros(16))), "mxfp4", backend=backend)
    assert codes.scale.tolist() == [125]
    assert codes.global_scale is None
    assert bytes(codes.packed.tolist()).hex() == WORKED_BYTES + 8 * "00"


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_saturates_under_floor_alone(backend, mode):
    codes = fp4_quantize(block(7.5, 1.0), "mxfp4", scale_rounding=mode, backend=backend)
    assert codes.scale.tolist() == [127 if mode == "floor" else 128]
    assert fp4_dequantize(codes, "mxfp4")[:2].tolist() == ([6, 1] if mode == "floor" else [8, 1])


@pytest.mark.parametrize(
    ("absmax", "scales"),
    [(4, (1, 1, 1, 1)), (6, (1, 1, 2, 1)), (6.5, (1, 1, 2, 2)), (7, (1, 2, 2, 2)),
     (1.74, (0.25, 0.25, 0.5, 0.5)), (1.75, (0.25, 0.5, 0.5, 0.5))],
)  # fmt: skip
def test_scale_table(backend, absmax, scales):
    for mode, scale in zip(MODES, scales, strict=True):
        codes = fp4_quantize(block(absmax), "mxfp4", scale_rounding=mode, backend=backend)
        assert codes.scale.tolist() == [127 + math.log2(scale)]


@pytest.mark.parametrize(
    ("x", "option", "error", "message"),
    [
        (torch.ones(2, 24), {"format": "nvfp4"}, ValueError, r"multiple of 16.*\[2, 24\]"),
        (torch.ones(2, 48), {"format": "mxfp4"}, ValueError, r"multiple of 32.*\[2, 48\]"),
        (torch.tensor(1.0), {"format": "nvfp4"}, ValueError, "multiple of 16"),
        (torch.ones(32), {"format": "fp4"}, ValueError, "'fp4'"),
        (torch.ones(32).int(), {"format": "mxfp4"}, TypeError, "int32"),
        (torch.ones(32), {"format": "mxfp4", "scale_rounding": "up"}, ValueError, "'up'"),
        (torch.ones(32), {"format": "nvfp4", "scale_rounding": "ceil"}, ValueError, "belongs to mxfp4"),
        (torch.ones(32), {"format": "mxfp4", "global_scale": ONE}, ValueError, "no global scale"),
        (torch.ones(32), {"format": "nvfp4", "global_scale": torch.ones(2)}, ValueError, r"one element.*\[2\]"),
    ],
)
def test_errors_name_what_they_saw(x, option, error, message):
    with pytest.raises(error, match=message):
        fp4_quantize(x, **option)

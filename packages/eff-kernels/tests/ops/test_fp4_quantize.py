import math

import pytest
import torch
from eff_kernels import FP4Codes, fp4_dequantize, fp4_quantize
from eff_kernels.op import triton_interprets
from eff_kernels.ops.fp4_quantize import api, reference
from eff_kernels.ops.fp4_quantize.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests
from eff_kernels.testing.specs import Spec
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytestmark = OpTests.pytestmark  # numpy warns under Triton's interpreter
BACKENDS = ["cpu", "reference", *(["triton"] if triton_interprets() else [])]
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


def quantize_to_bytes(x, global_scale=None, *, format, backend="auto", **options):
    """fp4_quantize with the results of the op: no PyTorch comparison takes float8."""
    packed, scale, _ = fp4_quantize(x, format, global_scale=global_scale, backend=backend, **options)
    return packed, scale.view(torch.uint8)


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


class TestQuantize(OpTests):
    function = staticmethod(quantize_to_bytes)
    reference = staticmethod(reference.quantize)
    op = api.OP
    specs = SPECS

    def schema_args(self, spec, args):
        options = {"scale_rounding": "floor", **spec.kwargs}
        return (*args, options["format"], options["scale_rounding"])


def dequantize_bytes(packed, scale, global_scale=None, *, format, backend="auto"):
    scale = scale.view(torch.float8_e4m3fn) if format == "nvfp4" else scale
    return fp4_dequantize(FP4Codes(packed, scale, global_scale), format, backend=backend)


def stored(name, rows, k, format, **tags):
    def make(draw):
        packed = draw.integers(rows, k // 2, low=0, high=256, dtype=torch.uint8)
        scale = draw.integers(rows, k // reference.BLOCKS[format], low=64, high=126, dtype=torch.uint8)
        return packed, scale, draw.uniform(1, low=0.1, dtype=torch.float32)[0] if format == "nvfp4" else None

    return Spec(name, make, kwargs={"format": format}, **tags)


class TestDequantize(OpTests):
    function = staticmethod(dequantize_bytes)
    reference = staticmethod(reference.dequantize)
    op = api.DEQUANTIZE_OP
    specs = (
        stored("nvfp4", 5, 112, "nvfp4"),
        stored("mxfp4", 9, 96, "mxfp4"),
        stored("no-rows", 0, 32, "mxfp4", tags=frozenset({"empty"})),
    )
    dtypes = (torch.float32,)

    def schema_args(self, spec, args):
        return (*args, spec.kwargs["format"], torch.float32)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 9),
    blocks=st.integers(0, 40),
    spread=st.sampled_from([0.0, 3.0, 40.0, 140.0]),
    format=st.sampled_from(["nvfp4", "mxfp4"]),
    mode=st.sampled_from(MODES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bad=st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45]),
    given_scale=st.booleans(),
    seed=st.integers(0, 10_000),
)
@example(  # blocks of subnormal bfloat16
    rows=2,
    blocks=5,
    spread=140.0,
    format="mxfp4",
    mode="floor",
    dtype=torch.bfloat16,
    bad=0.0,
    given_scale=False,
    seed=0,
)
def test_every_backend_gives_the_same_bits(rows, blocks, spread, format, mode, dtype, bad, given_scale, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, blocks * 32, generator=generator)
    x = (x * torch.exp2(torch.randn(rows, blocks, generator=generator) * spread).repeat_interleave(32, 1)).to(dtype)
    if x.numel():
        x[rows // 2, 7] = bad
    options = (
        {"scale_rounding": mode} if format == "mxfp4" else {"global_scale": torch.tensor(0.01)} if given_scale else {}
    )
    wanted = fp4_quantize(x, format, **options, backend="reference")
    for name in BACKENDS:
        actual = fp4_quantize(x, format, **options, backend=name)
        assert torch.equal(actual.packed, wanted.packed), name
        assert torch.equal(actual.scale.view(torch.uint8), wanted.scale.view(torch.uint8)), name
    for back in (torch.float32, dtype):
        values = [fp4_dequantize(wanted, format, dtype=back, backend=name) for name in ("cpu", "reference")]
        torch.testing.assert_close(*values, rtol=0, atol=0, equal_nan=True)


def test_every_scale_byte_and_code():
    """All 256 scales times all 16 codes, against PyTorch's own float8."""
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    packed = reference.pack(torch.arange(16, dtype=torch.uint8)).repeat(256, 1)
    nv = FP4Codes(packed, byte.view(torch.float8_e4m3fn), torch.tensor(0.37))
    mx = FP4Codes(packed.repeat(1, 2), byte, None)
    for codes, format in ((nv, "nvfp4"), (mx, "mxfp4")):
        wanted = fp4_dequantize(codes, format, backend="reference")
        torch.testing.assert_close(fp4_dequantize(codes, format), wanted, rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 5), seed=st.integers(0, 10_000), shift=st.integers(-20, 20))
def test_mxfp4_identities(rows, blocks, seed, shift):
    x = draw(rows, 32 * blocks, seed=seed)
    codes = fp4_quantize(x, "mxfp4")
    again = fp4_quantize(fp4_dequantize(codes, "mxfp4"), "mxfp4")
    assert torch.equal(again.packed, codes.packed)
    assert torch.equal(again.scale, codes.scale)
    shifted = fp4_quantize(x * 2.0**shift, "mxfp4")
    assert torch.equal(shifted.packed, codes.packed)
    assert torch.equal(shifted.scale.int(), codes.scale.int() + shift)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(2, 5), blocks=st.integers(1, 5), seed=st.integers(0, 10_000), shift=st.integers(-20, 20))
def test_nvfp4_identities(rows, blocks, seed, shift):
    x = draw(rows, 16 * blocks, seed=seed)
    values = fp4_dequantize(fp4_quantize(x, "nvfp4"), "nvfp4")
    assert torch.equal(fp4_dequantize(fp4_quantize(x * 2.0**shift, "nvfp4"), "nvfp4"), values * 2.0**shift)
    assert torch.equal(fp4_dequantize(fp4_quantize(x.flip(0), "nvfp4"), "nvfp4"), values.flip(0))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_error_is_at_most_half_a_gap(format, backend):
    x = draw(64, 256) * 3
    codes = fp4_quantize(x, format, scale_rounding="rceil" if format == "mxfp4" else "floor", backend=backend)
    scale = reference.scale_values(codes.scale.view(torch.uint8), codes.global_scale, format, torch.float32)
    size = (x / scale.repeat_interleave(reference.BLOCKS[format], -1)).abs()
    gap = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    error = (fp4_dequantize(codes, format) - x).abs() / scale.repeat_interleave(reference.BLOCKS[format], -1)
    inside = size <= 6
    assert inside.float().mean() > 0.95  # nvfp4 rounds its scale, down too
    assert (error[inside] <= gap[inside] / 2 * (1 + 1e-6)).all()


def test_nvfp4_is_closer_than_mxfp4_on_normal_numbers(backend):
    x = draw(64, 256) * 3
    errors = [(fp4_dequantize(fp4_quantize(x, f, backend=backend), f) - x).square().mean() for f in ("nvfp4", "mxfp4")]
    assert errors[0] < 0.8 * errors[1]


def test_one_level_of_scales_loses_small_tensors_and_two_do_not(backend):
    x = draw(16, 64) * 3e-4
    for s_g, low, high in ((None, 0.05, 0.15), (ONE, 0.9, 1.1)):
        back = fp4_dequantize(fp4_quantize(x, "nvfp4", global_scale=s_g, backend=backend), "nvfp4")
        assert low < (back - x).norm() / x.norm() < high


def test_zero_nan_and_subnormal_blocks(backend):
    x = torch.stack((torch.zeros(32), block(1.0, float("nan")), block(2.0**-127, -(2.0**-128)), block(1.0)))
    codes = fp4_quantize(x, "mxfp4", backend=backend)
    assert codes.scale[:, 0].tolist() == [0, 255, 0, 125]
    assert not codes.packed[:2].any()
    values = fp4_dequantize(codes, "mxfp4")
    assert values[1].isnan().all()
    assert torch.equal(values[[0, 2, 3]], x[[0, 2, 3]])
    codes = fp4_quantize(x[:, :16], "nvfp4", global_scale=ONE, backend=backend)
    assert codes.scale.view(torch.uint8)[:, 0].tolist() == [8, 127, 8, 35]
    assert fp4_dequantize(codes, "nvfp4")[1].isnan().all()


def test_infinity(backend):
    x = block(1.0, -float("inf"))
    for mode in MODES:
        codes = fp4_quantize(x, "mxfp4", scale_rounding=mode, backend=backend)
        assert fp4_dequantize(codes, "mxfp4")[:3].tolist() == [0, -float("inf"), 0]
    codes = fp4_quantize(x, "nvfp4", global_scale=ONE, backend=backend)
    assert fp4_dequantize(codes, "nvfp4")[1] == -6 * 448
    assert fp4_dequantize(fp4_quantize(x, "nvfp4", backend=backend), "nvfp4").isnan().all()


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_a_tensor_of_zeros(backend, format):
    codes = fp4_quantize(torch.zeros(2, 32), format, backend=backend)
    assert not fp4_dequantize(codes, format).any()


def test_leading_dimensions_and_strides(backend):
    x = draw(2, 3, 128)[..., ::2]
    for format in ("nvfp4", "mxfp4"):
        codes = fp4_quantize(x, format, backend=backend)
        flat = fp4_quantize(x.reshape(6, 64).contiguous(), format, backend="reference")
        assert torch.equal(codes.packed, flat.packed.view(2, 3, 32))
        assert fp4_dequantize(codes, format).shape == x.shape
        assert fp4_quantize(x[0, 0], format, backend=backend).packed.shape == (32,)


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


def test_triton_kernel_compiles_for_each_gpu():
    assert_compiles("eff_kernels.ops.fp4_quantize.triton")

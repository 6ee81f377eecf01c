import inspect

import pytest
import torch
from eff_kernels import FP4Codes, fp4_dequantize, fp4_linear, fp4_quantize, native
from eff_kernels.op import triton_interprets
from eff_kernels.ops.fp4_linear import api, cpu, reference
from eff_kernels.ops.fp4_linear.specs import SPECS
from eff_kernels.ops.fp4_quantize.reference import BLOCKS, scale_values
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = OpTests.pytestmark  # numpy warns under Triton's interpreter
BACKENDS = ["cpu", "reference", *(["triton"] if triton_interprets() else [])]
formats = pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])

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


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    weight = torch.tensor([[6.0, -4.0, 3.0, 2.0] + [0.5] * 12, [6.0] * 16]).repeat(1, 2)
    x = torch.tensor([[1.0, 1.0, 1.0, 1.0] + [2.0] * 28])
    for format in ("nvfp4", "mxfp4"):
        codes = fp4_quantize(weight, format, global_scale=torch.ones(1) if format == "nvfp4" else None)
        assert fp4_linear(x, *codes, torch.tensor([0.5, 1.0]), format=format).tolist() == [[45.5, 361.0]]


def layer(n, k, format, seed=1):
    return fp4_quantize(draw(n, k, seed=seed), format)


@formats
def test_dynamic_activations_are_those_of_fp4_quantize(format, backend):
    x, codes = draw(2, 3, 64), layer(10, 64, format)
    rounded = fp4_dequantize(fp4_quantize(x, format), format)
    y = fp4_linear(x, *codes, format=format, activations="dynamic", backend=backend)
    torch.testing.assert_close(y, fp4_linear(rounded, *codes, format=format, backend="reference"), rtol=0, atol=1e-5)
    assert y.shape == (2, 3, 10)


def test_a_given_input_scale_makes_rows_independent(backend):
    x, codes = draw(3, 64), layer(10, 64, "nvfp4")
    s_g = torch.tensor(0.002)
    options = {"format": "nvfp4", "activations": "dynamic", "input_global_scale": s_g, "backend": backend}
    rounded = fp4_dequantize(fp4_quantize(x, "nvfp4", global_scale=s_g), "nvfp4")
    y = fp4_linear(x, *codes, **options)
    torch.testing.assert_close(y, fp4_linear(rounded, *codes, format="nvfp4"), rtol=0, atol=1e-5)
    torch.testing.assert_close(fp4_linear(x[1:2], *codes, **options), y[1:2], rtol=0, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 60),
    blocks=st.integers(1, 70),
    format=st.sampled_from(["nvfp4", "mxfp4"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_a_row_has_the_same_bits_in_every_batch(m, n, blocks, format, dtype, data):
    k = blocks * BLOCKS[format]
    x, (packed, scale, s_g) = draw(m, k).to(dtype), layer(n, k, format)
    whole = fp4_linear(x, packed, scale, s_g, format=format, backend="cpu")
    first = data.draw(st.integers(0, m - 1))
    rows = slice(first, first + data.draw(st.integers(1, m - first)))
    assert torch.equal(fp4_linear(x[rows], packed, scale, s_g, format=format, backend="cpu"), whole[rows])
    some = data.draw(st.integers(1, n))
    fewer = fp4_linear(x, packed[:some], scale[:some], s_g, format=format, backend="cpu")
    assert torch.equal(fewer, whole[:, :some])


@pytest.mark.parametrize("m", [1, 3, 40])
@formats
def test_threads_change_no_bit(format, m):
    x, codes = draw(m, 320), layer(500, 320, format)
    once = fp4_linear(x, *codes, format=format, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(fp4_linear(x, *codes, format=format, backend="cpu"), once)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "defines",
    [
        pytest.param(["EFF_NO_AVX512"], id="avx2", marks=pytest.mark.slow),
        pytest.param(["EFF_GENERIC", "EFF_NO_VNNI"], id="any processor"),
    ],
)
@formats
def test_code_for_other_processors(defines, format, monkeypatch):
    if native.unavailable():
        pytest.skip(native.unavailable())
    kernel = native.library(*defines).eff_fp4_linear
    kernel.argtypes, kernel.restype = cpu._kernel().argtypes, cpu._kernel().restype
    codes = layer(31, 1120, format)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_kernel", lambda: kernel)
        x = draw(67, 1120)
        whole = fp4_linear(x, *codes, format=format, backend="cpu")
        for m in (1, 2, 3, 4, 5):
            assert torch.equal(fp4_linear(x[:m], *codes, format=format, backend="cpu"), whole[:m])
    torch.testing.assert_close(whole, fp4_linear(x, *codes, format=format), rtol=1e-5, atol=1e-4)


def test_every_scale_byte(backend):
    """One block with each scale there is: subnormal, negative and NaN ones too."""
    byte = torch.arange(256, dtype=torch.uint8)[:, None]
    for format, scale in (("nvfp4", byte.view(torch.float8_e4m3fn)), ("mxfp4", byte)):
        block = BLOCKS[format]
        packed = torch.full((256, block // 2), 0x22, dtype=torch.uint8)  # ones
        s_g = torch.ones(()) if format == "nvfp4" else None
        for m in (1, 6):
            y = fp4_linear(torch.full((m, block), 1 / block), packed, scale, s_g, format=format, backend=backend)
            wanted = scale_values(byte, s_g, format, torch.float32)[:, 0].expand(m, -1)
            torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@formats
def test_nan_and_infinity_spoil_their_row_alone(format, bad, backend):
    x = draw(7, 96)
    x[3, 11] = bad
    y = fp4_linear(x, *layer(9, 96, format), format=format, backend=backend)
    assert not y[3].isfinite().any()
    assert y[[0, 1, 2, 4, 5, 6]].isfinite().all()


@formats
def test_the_gradient_goes_over_the_weight_in_pieces(format):
    x, (packed, scale, s_g) = draw(3, 64).requires_grad_(), layer(1100, 64, format)
    grad = draw(3, 1100, seed=2)
    fp4_linear(x, packed, scale, s_g, format=format).backward(grad)
    torch.testing.assert_close(
        x.grad, grad @ fp4_dequantize(FP4Codes(packed, scale, s_g), format), rtol=1e-4, atol=1e-3
    )


def test_the_other_half_of_a_matrix_is_not_read():
    codes = layer(8, 64, "nvfp4")
    x = draw(2, 64)
    y = fp4_linear(x, *codes, format="nvfp4")
    half = fp4_linear(x, codes.packed[::2], codes.scale[::2], codes.global_scale, format="nvfp4")
    assert torch.equal(half, y[:, ::2])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 33)}, ValueError, r"\[2, 33\]"),
        ({"x": torch.ones(2, 32).int()}, TypeError, "int32"),
        ({"packed": torch.ones(3, 16)}, TypeError, "packed.*float32"),
        ({"scale": torch.ones(3, 2)}, TypeError, "float8_e4m3fn.*float32"),
        ({"scale": torch.ones(3, 1).to(torch.float8_e4m3fn)}, ValueError, r"\[3, 1\]"),
        ({"global_scale": None}, ValueError, "needs a global_scale"),
        ({"bias": torch.ones(2)}, ValueError, r"\[3\], got \[2\]"),
        ({"format": "fp4"}, ValueError, "'fp4'"),
        ({"activations": "static"}, ValueError, "'static'"),
        ({"input_global_scale": torch.ones(())}, ValueError, "activations='dynamic'"),
        ({"activations": "dynamic", "scale_rounding": "even"}, ValueError, "belongs to mxfp4"),
    ],
)
def test_errors_name_what_they_saw(change, error, message):
    codes = layer(3, 32, "nvfp4")
    valid = {"x": torch.ones(2, 32), **codes._asdict(), "format": "nvfp4"}
    with pytest.raises(error, match=message):
        fp4_linear(**{**valid, **change})


def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.fp4_linear.triton")

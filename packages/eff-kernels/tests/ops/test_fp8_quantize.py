import pytest
import torch
from eff_kernels import native
from eff_kernels.op import triton_interprets
from eff_kernels.ops.fp8_quantize import api, cpu, fp8_quantize, fp8_round, reference
from eff_kernels.ops.fp8_quantize.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ["cpu", "reference", *(["triton"] if triton_interprets() else [])]
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]


def as_bytes(x, *, dtype=torch.float8_e4m3fn, power_of_two=False, backend="auto"):
    """The public function, with codes as bytes, which can be compared."""
    codes, scale = fp8_quantize(x, dtype=dtype, power_of_two=power_of_two, backend=backend)
    return codes.view(torch.uint8), scale


class TestFP8Quantize(OpTests):
    function = staticmethod(as_bytes)
    reference = staticmethod(reference.quantize)
    op = api.OP
    specs = SPECS

    def expected(self, schema_args):
        # The scale is float32 by definition, so float64 is no truth for it.
        once = self.reference(*schema_args)
        return once, once


class TestFP8Round(OpTests):
    function = staticmethod(fp8_round)
    reference = staticmethod(reference.round_rows)
    op = api.ROUND_OP
    specs = SPECS
    differentiable = ("x",)
    gradcheck = False  # straight through, by design

    def schema_args(self, spec, args):
        k = spec.kwargs
        return *args, k.get("dtype", torch.float8_e4m3fn), k.get("power_of_two", False)

    def expected(self, schema_args):
        once = self.reference(*schema_args)
        return once, once.double()

    def expected_gradients(self, schema_args, cotangents):
        return list(cotangents), [c.double() for c in cotangents]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=FORMATS, ids=["e4m3", "e5m2"])
def dtype(request):
    return request.param


def test_worked_example(backend):
    codes, scale = fp8_quantize(torch.tensor([[1.0, -0.5, 0.3, 0.01, 0.001, 7.0]]), backend=backend)
    assert scale.tolist() == [0.015625]
    back = (codes.float() * scale[:, None]).tolist()
    assert back == [[1.0, -0.5, 0.3125, 0.009765625, 0.0009765625, 7.0]]


def test_every_number_of_the_format_is_its_own_code(backend, dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    values = codes.float()
    values = values[values.isfinite()]
    values = values[values.abs() > 0]
    found, scale = fp8_quantize(values[None] * 2.0**-20, dtype=dtype, backend=backend)
    assert scale.item() == 2.0**-20
    assert torch.equal(found.float()[0], values)


def test_halves_go_to_the_even_number(backend, dtype):
    """Between each two neighbours of the format, at the middle and just beside it."""
    codes = torch.arange(0, 0x7E if dtype == torch.float8_e4m3fn else 0x7B, dtype=torch.uint8)
    low, high = codes.view(dtype).float(), (codes + 1).view(dtype).float()
    middle = (low + high) / 2
    near = torch.nextafter(middle, torch.zeros(())), torch.nextafter(middle, torch.full((), 1e9))
    for values, wanted in ((middle, codes + codes % 2), (near[0], codes), (near[1], codes + 1)):
        row = torch.cat([values, torch.tensor([torch.finfo(dtype).max])])[None]
        found = as_bytes(row, dtype=dtype, backend=backend)
        assert found[1].item() == 1.0
        assert torch.equal(found[0][0, :-1], wanted)
        assert torch.equal(as_bytes(-row, dtype=dtype, backend=backend)[0][0, :-1], wanted | 0x80)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    k=st.integers(0, 70),
    dtype=st.sampled_from(FORMATS),
    power_of_two=st.booleans(),
    source=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-25, 10),
    bad=st.sampled_from([0.0, float("nan"), float("inf")]),
    seed=st.integers(0, 10_000),
)
def test_all_backends_give_the_same_bytes(rows, k, dtype, power_of_two, source, exponent, bad, seed):
    x = (torch.randn(rows, k, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent).to(source)
    if x.numel():
        x[rows // 2, k // 2] = bad
    wanted = as_bytes(x, dtype=dtype, power_of_two=power_of_two, backend="reference")
    for name in BACKENDS:
        found = as_bytes(x, dtype=dtype, power_of_two=power_of_two, backend=name)
        assert torch.equal(found[0], wanted[0]), name
        assert torch.equal(found[1].nan_to_num(-1.0), wanted[1].nan_to_num(-1.0)), name
        if name != "triton" or source == torch.float32:  # its interpreter truncates when it stores 16 bits
            values = fp8_round(x, dtype=dtype, power_of_two=power_of_two, backend=name)
            meant = (wanted[0].view(dtype).float() * wanted[1][:, None]).to(source)
            assert torch.equal(values.nan_to_num(-1.0), meant.nan_to_num(-1.0)), name


def test_rows_of_zeros_have_a_finite_scale(backend, dtype):
    codes, scale = fp8_quantize(torch.zeros(2, 5), dtype=dtype, backend=backend)
    assert not codes.float().any()
    assert scale.isfinite().all()
    assert (scale > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("k", [3, 20])  # within a vector, and in what is left of it
@pytest.mark.parametrize("power_of_two", [False, True])
def test_nan_and_infinity_mark_their_row_alone(backend, dtype, bad, k, power_of_two):
    x = torch.ones(3, k)
    x[1, 2] = bad
    codes, scale = fp8_quantize(x, dtype=dtype, power_of_two=power_of_two, backend=backend)
    assert scale[1].isnan()
    assert codes.float()[1].isnan().all()
    assert (codes.float() * scale[:, None])[[0, 2]].eq(1.0).all()


def test_powers_of_two_quantise_once_and_for_all(backend, dtype):
    x = torch.randn(50, 40)
    codes, scale = fp8_quantize(x, dtype=dtype, power_of_two=True, backend=backend)
    assert (torch.frexp(scale).mantissa == 0.5).all()
    once = codes.float() * scale[:, None]
    again = fp8_quantize(once, dtype=dtype, power_of_two=True, backend=backend)
    assert torch.equal(again.codes.float() * again.scale[:, None], once)
    assert (x.abs().amax(1) / torch.finfo(dtype).max <= scale).all()


def test_leading_dimensions_and_strides(backend):
    x = torch.randn(2, 3, 40)[..., ::2]
    codes, scale = as_bytes(x, backend=backend)
    flat = as_bytes(x.reshape(6, 20).contiguous(), backend="reference")
    assert torch.equal(codes, flat[0].view(2, 3, 20))
    assert torch.equal(scale, flat[1].view(2, 3))


def test_code_for_other_processors_gives_the_same_bytes(monkeypatch, dtype):
    import ctypes

    kernel = native.library("EFF_GENERIC", "EFF_NO_VNNI").eff_fp8_quantize
    kernel.argtypes = [ctypes.c_char_p]
    x = torch.randn(5, 77)
    wanted = as_bytes(x, dtype=dtype, backend="reference")
    monkeypatch.setattr(cpu, "_kernel", lambda: kernel)
    found = as_bytes(x, dtype=dtype, backend="cpu")
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(
    ("x", "dtype", "error", "message"),
    [
        (torch.tensor(1.0), torch.float8_e4m3fn, ValueError, "scalar"),
        (torch.ones(2, 2, dtype=torch.int32), torch.float8_e4m3fn, TypeError, "int32"),
        (torch.ones(2, 2), torch.float16, TypeError, "dtype must be .*e4m3fn.*e5m2, got torch.float16"),
        (torch.ones(2, 2), torch.float8_e4m3fnuz, TypeError, "fnuz"),
    ],
)
def test_errors_name_what_they_saw(x, dtype, error, message):
    with pytest.raises(error, match=message):
        fp8_quantize(x, dtype=dtype)


def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.fp8_quantize.triton")

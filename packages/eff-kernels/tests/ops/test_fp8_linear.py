import ctypes

import pytest
import torch
from eff_kernels import native
from eff_kernels.op import triton_interprets
from eff_kernels.ops.fp8_linear import api, autograd, cpu, fp8_linear, reference
from eff_kernels.ops.fp8_linear.specs import SPECS
from eff_kernels.ops.fp8_quantize import fp8_quantize
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ["cpu", "reference", *(["triton"] if triton_interprets() else [])]
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2]

# Triton's interpreter computes with numpy, which warns where a GPU gives NaN without a word.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


class TestFP8Linear(OpTests):
    function = staticmethod(fp8_linear)
    reference = staticmethod(reference.fp8_linear)
    op = api.OP
    specs = SPECS

    def schema_args(self, spec, args):
        x, weight, scale, bias = args
        return x, weight, scale, bias, spec.kwargs.get("activations", "none"), x.dtype

    def expected(self, schema_args):
        x, weight, scale, bias, activations, _ = schema_args
        wide = (x.double(), weight, scale.double(), None if bias is None else bias.double(), activations)
        return self.reference(*schema_args), self.reference(*wide, torch.float64)

    def test_opcheck(self, backend, one_spec):
        """Without the check that nothing is written to, which PyTorch cannot do for FP8; test_forward does it."""
        args = (*self.schema_args(one_spec, self._args(one_spec, torch.float32, backend)), backend)
        kinds = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(self.op.registered, args, test_utils=kinds)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=FORMATS, ids=["e4m3", "e5m2"])
def dtype(request):
    return request.param


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(n, k, dtype=torch.float8_e4m3fn):
    return fp8_quantize(draw(n, k, seed=1), dtype=dtype)


def test_worked_example(backend, dtype):
    x = torch.tensor([[1.0, -2.0, 0.5]])
    weight = torch.tensor([[2.0, 1.0, 4.0], [0.25, 0.0, -8.0]]).to(dtype)
    y = fp8_linear(x, weight, torch.tensor([0.5, 2.0]), torch.tensor([0.5, 1.0]), backend=backend)
    assert y.tolist() == [[1.5, -6.5]]


@pytest.mark.parametrize("rows", [1, 3])
def test_every_code_is_decoded_exactly(backend, dtype, rows):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    weight = torch.zeros(256, 70, dtype=torch.uint8)
    weight[:, 11] = torch.arange(256)
    x = torch.zeros(rows, 70)
    x[:, 11] = 1.0
    y = fp8_linear(x, weight.view(dtype), torch.ones(256), backend=backend)
    finite = codes.float().isfinite()
    assert torch.equal(y[:, finite], codes.float()[finite].expand(rows, -1))
    assert not y[:, ~finite].isfinite().any()
    assert torch.equal(autograd.decode(codes).nan_to_num(1e9), codes.float().nan_to_num(1e9))


def test_dynamic_is_the_product_of_rounded_rows(backend, dtype):
    x, (weight, scale) = draw(4, 90), layer(13, 90, dtype)
    rounded = fp8_quantize(x, dtype=dtype)
    wanted = (rounded.codes.double() * rounded.scale.double()[:, None]) @ (
        weight.double() * scale.double()[:, None]
    ).t()
    y = fp8_linear(x, weight, scale, activations="dynamic", backend=backend)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 60),
    k=st.one_of(st.integers(1, 140), st.integers(1000, 1100)),
    source=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    dtype=st.sampled_from(FORMATS),
    activations=st.sampled_from(["none", "dynamic"]),
    data=st.data(),
)
def test_a_row_has_the_same_bits_in_every_batch(m, n, k, source, dtype, activations, data):
    x, (weight, scale) = draw(m, k).to(source), layer(n, k, dtype)
    whole = fp8_linear(x, weight, scale, activations=activations, backend="cpu")
    first = data.draw(st.integers(0, m - 1))
    count = data.draw(st.integers(1, m - first))
    part = fp8_linear(x[first : first + count], weight, scale, activations=activations, backend="cpu")
    assert torch.equal(part, whole[first : first + count])
    some = data.draw(st.integers(1, n))
    fewer = fp8_linear(x, weight[:some], scale[:some], activations=activations, backend="cpu")
    assert torch.equal(fewer, whole[:, :some])


def test_threads_change_no_bit():
    x, (weight, scale) = draw(140, 300), layer(500, 300)
    once = fp8_linear(x, weight, scale, activations="dynamic", backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(fp8_linear(x, weight, scale, activations="dynamic", backend="cpu"), once)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "defines",
    [
        pytest.param(["EFF_NO_VBMI"], id="avx512", marks=pytest.mark.slow),
        pytest.param(["EFF_NO_AVX512"], id="avx2", marks=pytest.mark.slow),
        pytest.param(["EFF_GENERIC", "EFF_NO_VNNI"], id="any processor"),
    ],
)
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_code_for_other_processors(monkeypatch, dtype, defines, activations):
    kernel = native.library(*defines).eff_fp8_linear
    kernel.argtypes = [ctypes.c_char_p]
    monkeypatch.setattr(cpu, "_kernel", lambda: kernel)
    for m, n, k in ((1, 9, 130), (5, 7, 83), (70, 26, 1030), (1, 6, 2100)):
        x, (weight, scale) = draw(m, k), layer(n, k, dtype)
        weight.view(torch.uint8)[0, k // 2] = 0x7F
        y = fp8_linear(x, weight, scale, activations=activations, backend="cpu")
        truth = fp8_linear(x.double(), weight, scale, activations=activations, backend="reference")
        assert y[:, 0].isnan().all()
        torch.testing.assert_close(y[:, 1:].double(), truth[:, 1:], rtol=1e-5, atol=2e-5)
        assert torch.equal(fp8_linear(x[-1:], weight, scale, activations=activations, backend="cpu")[:, 1:], y[-1:, 1:])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_nan_and_infinity_spoil_their_row_alone(backend, bad, activations):
    x, (weight, scale) = draw(5, 40), layer(9, 40)
    x[3, 11] = bad
    y = fp8_linear(x, weight, scale, activations=activations, backend=backend)
    assert not y[3].isfinite().any()
    assert y[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("shape", [(5, 48), (2, 3, 48)])
def test_gradients_are_those_of_the_dequantised_weight(backend, dtype, activations, shape):
    weight, scale = layer(24, 48, dtype)
    x, bias = draw(*shape).requires_grad_(), torch.zeros(24, requires_grad=True)
    dy = draw(*shape[:-1], 24, seed=3)
    fp8_linear(x, weight, scale, bias, activations=activations, backend=backend).backward(dy)
    torch.testing.assert_close(x.grad, dy @ (weight.float() * scale[:, None]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, dy.reshape(-1, 24).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_have_the_dtype_of_the_input(source):
    weight, scale = layer(24, 1100)
    x = draw(3, 1100).to(source).requires_grad_()
    fp8_linear(x, weight, scale).sum().backward()
    assert x.grad.dtype == source
    wanted = (weight.float() * scale[:, None]).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad.float(), wanted, rtol=2**-7, atol=1e-5)


def test_compiles_with_a_gradient(backend):
    weight, scale = layer(24, 48)
    x = draw(3, 48).requires_grad_()
    compiled = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    y = compiled(x, weight, scale, backend=backend)
    assert torch.equal(y, fp8_linear(x, weight, scale, backend=backend))
    y.sum().backward()
    torch.testing.assert_close(x.grad, (weight.float() * scale[:, None]).sum(0).expand(3, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"\[2, 5\]"),
        ({"weight": torch.ones(3, 4)}, TypeError, "weight must be .*float8_e5m2, got torch.float32"),
        ({"scale": torch.ones(3, 1)}, ValueError, r"scale.*\[3\], got \[3, 1\]"),
        ({"scale": torch.ones(3).double()}, TypeError, "scale must be float32, got torch.float64"),
        ({"bias": torch.ones(2)}, ValueError, r"\[3\], got \[2\]"),
        ({"x": torch.ones(2, 4).long()}, TypeError, "x.*int64"),
        ({"activations": "static"}, ValueError, "'none' or 'dynamic', got 'static'"),
    ],
)
def test_errors_name_what_they_saw(change, error, message):
    whole = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4).to(torch.float8_e4m3fn), "scale": torch.ones(3)}
    with pytest.raises(error, match=message):
        fp8_linear(**{**whole, **change})


def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.fp8_linear.triton")

import pytest
import torch
from eff_kernels import native
from eff_kernels.op import triton_interprets
from eff_kernels.ops.int4_linear import api, cpu, int4_linear, int4_pack, int4_unpack, int8_static_linear, reference
from eff_kernels.ops.int4_linear.specs import INT4_SPECS, INT8_SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = [b.name for b in api.OP.backends if b.name != "triton" or triton_interprets()]


def positional(x, packed, scale, bias, input_scale, *, backend="auto"):
    return int4_linear(x, packed, scale, bias, input_scale=input_scale, backend=backend)


class TestInt4Linear(OpTests):
    function = staticmethod(positional)
    reference = staticmethod(reference.linear)
    op = api.OP
    specs = INT4_SPECS

    def schema_args(self, spec, args):
        return (*args, args[0].dtype)


class TestInt8StaticLinear(OpTests):
    function = staticmethod(int8_static_linear)
    reference = staticmethod(reference.linear)
    op = api.OP
    specs = INT8_SPECS

    def schema_args(self, spec, args):
        x, weight, scale, input_scale, bias = args
        return x, weight, scale, bias, input_scale, x.dtype


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def random_codes(n, k, seed=0, low=-8, high=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, (n, k), generator=generator, dtype=torch.int8)


def test_packing_puts_the_even_index_into_the_low_half():
    packed = int4_pack(torch.tensor([[1, -2, 7, -8]], dtype=torch.int8))
    assert packed.tolist() == [[0xE1, 0x87]]
    assert int4_unpack(packed).tolist() == [[1, -2, 7, -8]]


def test_every_byte_unpacks_and_packs_to_itself():
    every = torch.arange(256, dtype=torch.uint8).view(1, -1)
    codes = int4_unpack(every)
    assert torch.equal(int4_pack(codes), every)
    assert codes.dtype == torch.int8
    assert (codes.min(), codes.max()) == (-8, 7)


def test_packing_wants_an_even_number():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        int4_pack(torch.zeros(2, 3, dtype=torch.int8))


def test_worked_example(backend):
    x = torch.tensor([[1.0, -2.0, 0.5, 4.0], [0.0, 3.0, -1.0, 0.75]])
    packed = int4_pack(torch.tensor([[7, -8, 1, 0], [1, 2, 3, -4]], dtype=torch.int8))
    scale, bias = torch.tensor([0.5, 0.25]), torch.tensor([1.0, -1.0])
    # Codes of x: [32, -64, 16, 127] with rowmax 4 and [0, 127, -42, 32] with rowmax 3.
    sums = torch.tensor([[752.0, -556.0], [-1058.0, 0.0]])
    wanted = sums * torch.tensor([[4 / 127], [3 / 127]]) * scale + bias
    torch.testing.assert_close(int4_linear(x, packed, scale, bias, backend=backend), wanted, rtol=1e-6, atol=0)


def test_worked_example_with_a_static_scale(backend):
    x = torch.tensor([[1.0, -2.0, 0.25, 40.0]])
    step = torch.tensor([0.5, 0.125, 0.1, 0.25])
    # x / step = [2, -16, 2.5, 160]: codes [2, -16, 2, 127], the third half to even, the last at its limit.
    codes = torch.tensor([[7, -8, 1, 1], [1, 2, 3, -4]], dtype=torch.int8)
    wanted = torch.tensor([[(14 + 128 + 2 + 127) * 0.5, (2 - 32 + 6 - 508) * 0.25]])
    scale = torch.tensor([0.5, 0.25])
    assert torch.equal(int4_linear(x, int4_pack(codes), scale, input_scale=step, backend=backend), wanted)
    assert torch.equal(int8_static_linear(x, codes, scale, step, backend=backend), wanted)


@pytest.mark.parametrize("m", [1, 2, 5, 70])
@pytest.mark.parametrize("value", [-1000.0, 1000.0])
@pytest.mark.parametrize(("bits", "code"), [(4, -8), (4, 7), (8, -128), (8, 127)])
def test_the_largest_codes_do_not_saturate(backend, m, value, bits, code):
    """Every product is as large as it can be, on either side, and sums of neighbours too."""
    x = torch.full((m, 1502), value)
    x[:, 1::7] = -value
    codes = torch.full((13, 1502), code, dtype=torch.int8)
    step, scale = torch.ones(1502), torch.ones(13)
    if bits == 4:
        y = int4_linear(x, int4_pack(codes), scale, input_scale=step, backend=backend)
    else:
        y = int8_static_linear(x, codes, scale, step, backend=backend)
    assert torch.equal(y, (x.clamp(-128, 127).double() @ codes.double().t()).float())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sums_are_exact_up_to_the_largest_k(backend):
    """A sum of 2^31 - 2048: int32 to its edge, for a lone row and for several."""
    k = 2**21 - 2
    packed, ones = int4_pack(torch.full((1, k), -8, dtype=torch.int8)), torch.ones(k)
    for m in (1, 3):
        y = int4_linear(torch.full((m, k), -1000.0), packed, ones[:1], input_scale=ones, backend=backend)
        assert y.tolist() == [[float(torch.tensor(1024 * k, dtype=torch.float32))]] * m


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(0, 140),
    n=st.integers(1, 60),
    half=st.integers(0, 150),
    bits=st.sampled_from([4, 8]),
    static=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_backends_agree_to_the_last_rounding(m, n, half, bits, static, bias, seed):
    """The integers are the same, so that nothing differs but the order of three float operations."""
    generator = torch.Generator().manual_seed(seed)
    k = 2 * half
    x = torch.randn(m, k, generator=generator) * 2
    codes = random_codes(n, k, seed, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    weight = int4_pack(codes) if bits == 4 else codes
    scale = torch.rand(n, generator=generator) + 0.5
    b = torch.randn(n, generator=generator) if bias else None
    step = torch.rand(k, generator=generator) * 0.03 + 0.01 if static or bits == 8 else None
    args = (x, weight, scale, b, step)
    wide = reference.linear(
        *(a.double() if a is not None and a.is_floating_point() else a for a in args), torch.float64
    )
    bound = 4 * 2**-24 * (wide.abs() + (0 if b is None else 2 * b.abs().double()))
    actual = api.OP(*args, torch.float32)
    assert ((actual.double() - wide).abs() <= bound).all()


def test_folded_static_scale_equals_fake_quantisation(backend):
    """The integer product is the float product of the rounded activations and the rounded, folded weight."""
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(20, 96, generator=generator), torch.randn(30, 96, generator=generator)
    step = x.abs().amax(0) / 127
    folded = weight * step
    scale = folded.abs().amax(1) / 7
    codes = (folded / scale[:, None]).round().clamp(-8, 7)
    y = int4_linear(x, int4_pack(codes.to(torch.int8)), scale, input_scale=step, backend=backend)
    fake_x = (x / step).round().clamp(-128, 127).double() * step.double()
    fake_weight = codes.double() * scale.double()[:, None] / step.double()
    torch.testing.assert_close(y.double(), fake_x @ fake_weight.t(), rtol=1e-5, atol=1e-5)
    assert (y - x @ weight.t()).norm() < 0.2 * (x @ weight.t()).norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_nan_and_infinity_spoil_their_row_alone(backend, bad, static, rows):
    x = torch.randn(rows, 40)
    x[rows // 2, 7] = bad
    step = torch.ones(40) if static else None
    y = int4_linear(x, int4_pack(random_codes(30, 40)), torch.ones(30), input_scale=step, backend=backend)
    spoiled = torch.arange(rows) == rows // 2
    assert y[spoiled].isnan().all()
    assert y[~spoiled].isfinite().all()


def test_zero_rows_give_the_bias(backend):
    bias = torch.randn(3)
    y = int4_linear(torch.zeros(2, 8), int4_pack(random_codes(3, 8)), torch.ones(3), bias, backend=backend)
    assert torch.equal(y, bias.expand(2, 3))


@pytest.mark.parametrize("static", [False, True])
def test_rows_do_not_depend_on_each_other(backend, static):
    x = torch.randn(70, 90) * 3
    step = torch.full((90,), 0.05) if static else None
    args = (int4_pack(random_codes(50, 90)), torch.rand(50))
    together = int4_linear(x, *args, input_scale=step, backend=backend)
    alone = torch.cat([int4_linear(row[None], *args, input_scale=step, backend=backend) for row in x])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32), (32,)])
def test_leading_dimensions_and_out_dtype(backend, shape):
    x, packed, scale = torch.randn(shape), int4_pack(random_codes(10, 32)), torch.rand(10)
    y = int4_linear(x, packed, scale, out_dtype=torch.float16, backend=backend)
    rows = int4_linear(x.reshape(-1, 32), packed, scale, backend=backend)
    assert torch.equal(y, rows.half().view(*shape[:-1], 10))


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)])
@pytest.mark.parametrize("static", [False, True])
def test_gradients_are_those_of_the_dequantised_weight(backend, shape, static):
    codes, scale = random_codes(600, 32), torch.rand(600)
    step = torch.rand(32) * 0.1 + 0.05 if static else None
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(600, requires_grad=True)
    y = int4_linear(x, int4_pack(codes), scale, bias, input_scale=step, backend=backend)
    grad = torch.randn(y.shape)
    y.backward(grad)
    weight = codes.double() * scale.double()[:, None] / (1 if step is None else step.double())
    torch.testing.assert_close(x.grad.double(), grad.double() @ weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(bias.grad, grad.reshape(-1, 600).sum(0))


def test_an_adapter_learns_on_a_frozen_base():
    torch.manual_seed(0)
    codes, scale = random_codes(16, 16), torch.full((16,), 0.1)
    target = torch.randn(16, 16) * 0.3
    down, up = torch.randn(4, 16, requires_grad=True), torch.zeros(16, 4, requires_grad=True)
    optimizer = torch.optim.Adam([down, up], lr=0.02)
    losses = []
    for _ in range(120):
        x = torch.randn(32, 16)
        hidden = x + x @ down.t() @ up.t()  # in front of the base: its gradient passes through it
        y = int4_linear(hidden, int4_pack(codes), scale)
        loss = (y - (x + x @ target) @ (codes * 0.1).t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


@pytest.mark.parametrize("defines", [["EFF_NO_VNNI"], ["EFF_EMULATE_VNNI"], ["EFF_NO_VNNI", "EFF_GENERIC"]])
def test_code_paths_of_other_processors(defines, monkeypatch):
    """Paths that this processor would not take, compiled for it; loading runs the self test on top."""
    if native.unavailable():
        pytest.skip(native.unavailable())
    kernel = native.library(*defines).eff_int4_linear
    kernel.argtypes, kernel.restype = cpu._kernel().argtypes, cpu._kernel().restype
    monkeypatch.setattr(cpu, "_kernel", lambda: kernel)
    for k in (2, 78, 2300):
        codes, scale, step = random_codes(31, k), torch.ones(31), torch.ones(k)
        wide_codes = random_codes(31, k, low=-128, high=127)
        for m in (1, 2, 5, 6, 66):
            x = random_codes(m, k, seed=m, low=-128, high=127).float()
            exact = x.double() @ codes.double().t()
            assert torch.equal(int4_linear(x, int4_pack(codes), scale, input_scale=step, backend="cpu").double(), exact)
            exact = x.double() @ wide_codes.double().t()
            y = int8_static_linear(x, wide_codes, scale, step, backend="cpu")
            assert torch.equal(y, exact.float())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"\[2, 5\]"),
        ({"x": torch.tensor(1.0)}, ValueError, r"\[\]"),
        ({"packed": torch.ones(3, 2)}, TypeError, "float32"),
        ({"packed": torch.ones(6, dtype=torch.uint8)}, ValueError, r"\[6\]"),
        ({"scale": torch.ones(4)}, ValueError, r"\[4\]"),
        ({"scale": torch.ones(3).half()}, TypeError, "float16"),
        ({"input_scale": torch.ones(3)}, ValueError, r"\[3\]"),
        ({"input_scale": torch.ones(4).half()}, TypeError, "float16"),
        ({"bias": torch.ones(2)}, ValueError, r"\[2\]"),
        ({"bias": torch.ones(3, dtype=torch.int8)}, TypeError, "int8"),
        ({"x": torch.ones(2, 4, dtype=torch.int8)}, TypeError, "int8"),
        ({"backend": "gpu"}, ValueError, "gpu"),
    ],
)
def test_errors_name_what_they_saw(change, error, message):
    call = {"x": torch.ones(2, 4), "packed": torch.ones(3, 2, dtype=torch.uint8), "scale": torch.ones(3), **change}
    with pytest.raises(error, match=message):
        int4_linear(**call)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"\[2, 5\]"),
        ({"weight": torch.ones(3, 4, dtype=torch.uint8)}, TypeError, "uint8"),
        ({"weight": torch.ones(12, dtype=torch.int8)}, ValueError, r"\[12\]"),
    ],
)
def test_errors_of_the_int8_form_name_what_they_saw(change, error, message):
    call = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4, dtype=torch.int8), "scale": torch.ones(3)}
    with pytest.raises(error, match=message):
        int8_static_linear(**{**call, "input_scale": torch.ones(4), **change})


def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.int4_linear.triton")


@pytest.mark.skipif(not triton_interprets(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 40, 70), (70, 33, 300), (130, 129, 128), (1, 5, 0)])
def test_triton_equals_the_reference_in_each_configuration(bits, m, n, k):
    """Every block size that is chosen by the number of rows, with borders inside a block, static steps and a bias."""
    codes = random_codes(n, k, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1)
    weight = int4_pack(codes) if bits == 4 else codes
    args = (torch.randn(m, k).bfloat16(), weight, torch.rand(n), torch.randn(n), torch.rand(k) * 0.05 + 0.01)
    actual = api.OP(*args, torch.float32, backend="triton")
    torch.testing.assert_close(actual, api.OP(*args, torch.float32, backend="reference"), rtol=1e-6, atol=1e-5)

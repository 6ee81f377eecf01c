import ctypes
import itertools

import pytest
import torch
from eff_kernels import native
from eff_kernels.op import triton_interprets
from eff_kernels.ops.int8_linear import api, int8_linear, reference
from eff_kernels.ops.int8_linear.specs import SPECS
from eff_kernels.ops.int8_quantize import int8_quantize_rows
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ["cpu", "reference", *(["triton"] if triton_interprets() else [])]


class TestInt8Linear(OpTests):
    function = staticmethod(int8_linear)
    reference = staticmethod(reference.int8_linear)
    op = api.OP
    specs = SPECS

    def schema_args(self, spec, args):
        x, weight, absmax, bias = args
        k = spec.kwargs
        options = (k.get("threshold", 0.0), k.get("per_token_outliers", False), k.get("activation", "dynamic"))
        options = (*options, k.get("activation_group"))
        return x, weight, absmax, bias, *options, x.dtype

    def expected(self, schema_args):
        x, weight, absmax, bias, *options, _ = schema_args
        wide = (x.double(), weight, absmax.double(), None if bias is None else bias.double(), *options, torch.float64)
        return self.reference(*schema_args), self.reference(*wide)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def layer(n, k, seed=0):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return int8_quantize_rows(weight)[:2]


def dequantized(codes, absmax):
    return codes.double() * absmax.double()[:, None] / 127


def test_worked_example(backend):
    a = torch.tensor([[1.0, -2.0, 8.0, 0.5], [0.25, 3.0, -0.5, -1.0]])
    codes, absmax, _ = int8_quantize_rows(torch.tensor([[0.5, -1.0, 0.25, 2.0], [1.0, 1.0, -4.0, 0.5]]))
    assert codes.tolist() == [[32, -64, 16, 127], [32, 32, -127, 16]]
    mixed = int8_linear(a, codes, absmax, threshold=6.0, backend=backend)
    # Row 0, output 0: (64*32 + 127*64 + 32*127) * 2 * 2 / 127**2 + 8 * 16 * 2 / 127, and so on.
    torch.testing.assert_close(mixed, torch.tensor([[5.54730, -32.74598], [-5.00295, 4.78554]]), rtol=0, atol=1e-4)
    plain = int8_linear(a, codes, absmax, backend=backend)
    torch.testing.assert_close(plain, torch.tensor([[5.56315, -32.76186], [-5.00192, 4.76979]]), rtol=0, atol=1e-4)


def test_worked_example_with_groups(backend):
    """Two groups of 32 columns with two entries each; the scales of x are 2 / 127 and 0.5 / 127."""
    x, weight = torch.zeros(1, 64), torch.zeros(1, 64, dtype=torch.int8)
    x[0, [0, 1, 32, 33]] = torch.tensor([2.0, -1.0, 0.5, 0.25])
    weight[0, [0, 1, 32, 33]] = torch.tensor([10, 20, 30, 40], dtype=torch.int8)
    absmax = torch.tensor([127.0])
    y = int8_linear(x, weight, absmax, activation_group=32, backend=backend)
    wanted = (127 * 10 - 64 * 20) * 2 / 127 + (127 * 30 + 64 * 40) * 0.5 / 127
    torch.testing.assert_close(y, torch.tensor([[wanted]]), rtol=1e-6, atol=0)
    whole = int8_linear(x, weight, absmax, backend=backend)
    torch.testing.assert_close(whole, torch.tensor([[(127 * 10 - 64 * 20 + 32 * 30 + 16 * 40) * 2 / 127]]))


@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_round_less_than_rows(backend, group):
    codes, absmax = layer(40, 512)
    x = torch.randn(20, 512, generator=torch.Generator().manual_seed(4)).pow(3)
    exact = x.double() @ dequantized(codes, absmax).t()

    def error(group):
        y = int8_linear(x, codes, absmax, activation_group=group, backend=backend)
        return (y.double() - exact).norm() / exact.norm()

    assert error(group) < 0.8 * error(None)


@pytest.mark.parametrize("m", [1, 5])
def test_a_group_as_long_as_the_row_is_the_row(backend, m):
    codes, absmax = layer(40, 160)
    x = torch.randn(m, 160) * 3
    for threshold in (0.0, 6.0):
        whole = int8_linear(x, codes, absmax, threshold=threshold, backend=backend)
        for group in (160, 192, 4096):
            options = {"threshold": threshold, "activation_group": group}
            assert torch.equal(whole, int8_linear(x, codes, absmax, backend=backend, **options))


@pytest.mark.parametrize("group", [None, 32, 64, 96, 128, 320, 512])
@pytest.mark.parametrize("k", [190, 1111])
def test_compiled_rows_have_the_same_bits_in_any_batch(group, k):
    """Sums are exact within a group and float32 across groups in one order, whichever way a batch takes."""
    codes, absmax = layer(53, k)
    x = torch.randn(67, k, generator=torch.Generator().manual_seed(5)) * 3
    for options in ({}, {"threshold": 6.0, "per_token_outliers": True}):
        options = {**options, "activation_group": group, "backend": "cpu"}
        together = int8_linear(x, codes, absmax, **options)
        assert torch.equal(together, torch.cat([int8_linear(row[None], codes, absmax, **options) for row in x]))
        assert torch.equal(together[:7], int8_linear(x[:7], codes, absmax, **options))


def test_exact_where_both_sides_are_representable(backend):
    """Integers up to 127 with an absmax of 127 are their own codes: the product is exact."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-127, 128, (9, 1500), generator=generator).float()
    weight = torch.randint(-127, 128, (13, 1500), generator=generator)
    x[:, 0], weight[:, 0] = 127, 127
    y = int8_linear(x, weight.to(torch.int8), torch.full((13,), 127.0), backend=backend)
    exact = x.double() @ weight.double().t()
    assert (y.double() - exact).abs().max() <= exact.abs().max() * 2**-22


@pytest.mark.parametrize("code", [-128, -127, 127])
@pytest.mark.parametrize("m", [1, 5])
def test_the_largest_codes_do_not_saturate(backend, code, m):
    """Sums of neighbouring products are the largest here; -128 is in no weight of ours but may be in a file."""
    x = torch.full((m, 1500), 127.0)
    x[:, 1::3] = -127
    weight = torch.full((13, 1500), code, dtype=torch.int8)
    y = int8_linear(x, weight, torch.full((13,), 127.0), backend=backend)
    torch.testing.assert_close(y, x @ weight.float().t(), rtol=2**-22, atol=0)


@settings(max_examples=80, deadline=None)
@given(
    m=st.integers(0, 140),
    n=st.integers(1, 60),
    k=st.integers(1, 150),
    threshold=st.sampled_from([0.0, 0.01, 2.5, 6.0]),
    per_token=st.booleans(),
    group=st.sampled_from([None, 32, 64, 96]),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_compiled_code_equals_the_reference(m, n, k, threshold, per_token, group, bias, seed):
    codes, absmax = layer(n, k, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 2
    b = torch.randn(n, generator=generator) if bias else None
    kwargs = {"threshold": threshold, "per_token_outliers": per_token, "activation_group": group}
    actual = int8_linear(x, codes, absmax, b, backend="cpu", **kwargs)
    wide_bias = None if b is None else b.double()
    wide = reference.int8_linear(
        x.double(), codes, absmax.double(), wide_bias, threshold, per_token, "dynamic", group, torch.float64
    )
    # Each sum of K products in float32 is off by at most K roundings of its terms.
    bound = (x.abs().double() @ dequantized(codes, absmax).abs().t() + (0 if b is None else b.abs())) * (k + 8) * 2**-24
    assert ((actual.double() - wide).abs() <= bound + 1e-30).all()


def test_a_threshold_beyond_all_entries_changes_nothing(backend):
    codes, absmax = layer(20, 64)
    x = torch.randn(5, 64)
    plain = int8_linear(x, codes, absmax, backend=backend)
    assert torch.equal(plain, int8_linear(x, codes, absmax, threshold=float("inf"), backend=backend))


def test_a_tiny_threshold_gives_the_dequantized_product(backend):
    codes, absmax = layer(20, 64)
    x = torch.randn(5, 64)
    y = int8_linear(x, codes, absmax, threshold=1e-30, backend=backend)
    torch.testing.assert_close(y.double(), x.double() @ dequantized(codes, absmax).t(), rtol=1e-5, atol=1e-5)


def test_zero_rows_and_zero_weights_give_zeros(backend):
    codes, absmax = int8_quantize_rows(torch.zeros(3, 8))[:2]
    assert not int8_linear(torch.randn(2, 8), codes, absmax, backend=backend).any()
    codes, absmax = layer(3, 8)
    assert not int8_linear(torch.zeros(2, 8), codes, absmax, backend=backend).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_spoil_their_row_alone(backend, bad):
    codes, absmax = layer(30, 40)
    x = torch.randn(4, 40)
    x[2, 7] = bad
    y = int8_linear(x, codes, absmax, backend=backend)
    assert y[2].isnan().all()
    assert y[[0, 1, 3]].isfinite().all()


def test_error_bound(backend):
    """Rounding moves a code by at most one half, on both sides."""
    weight, x = torch.randn(40, 96), torch.randn(30, 96)
    codes, absmax, _ = int8_quantize_rows(weight)
    rowmax = x.abs().amax(1)
    y = int8_linear(x, codes, absmax, backend=backend)
    step_x, step_w = rowmax[:, None] / 127, absmax[None] / 127
    bound = 96 * (0.5 * step_x * weight.abs().max() + 0.5 * step_w * x.abs().max() + 0.25 * step_x * step_w)
    assert ((y - x @ weight.t()).abs() <= bound).all()


def test_decomposition_restores_what_an_outlier_column_destroys(backend):
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(500, 256, generator=generator), torch.randn(64, 256, generator=generator)
    x[:, 17] *= 60
    codes, absmax, _ = int8_quantize_rows(weight)
    exact = x.double() @ dequantized(codes, absmax).t()

    def signal_to_noise(y):
        # Without the share of the outlier column, which would drown the rest.
        rest = exact - x[:, 17:18].double() @ dequantized(codes, absmax)[:, 17:18].t()
        return 10 * torch.log10(rest.square().mean() / (y.double() - exact).square().mean())

    assert signal_to_noise(int8_linear(x, codes, absmax, backend=backend)) < 20
    assert signal_to_noise(int8_linear(x, codes, absmax, threshold=6.0, backend=backend)) > 35


def test_rows_do_not_depend_on_each_other_without_shared_outliers(backend):
    codes, absmax = layer(50, 90)
    x = torch.randn(70, 90) * 3
    for kwargs in ({}, {"threshold": 6.0, "per_token_outliers": True}):
        together = int8_linear(x, codes, absmax, backend=backend, **kwargs)
        alone = torch.cat([int8_linear(row[None], codes, absmax, backend=backend, **kwargs) for row in x])
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-5)


def test_shared_outliers_take_the_column_out_for_all_rows(backend):
    """The documented coupling: another row's outlier moves this row's entry from int8 to floating point."""
    codes, absmax = layer(8, 4)
    quiet, loud = torch.tensor([[1.0, 0.013, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0, 1.0]])
    alone = int8_linear(quiet, codes, absmax, threshold=6.0, backend=backend)
    beside = int8_linear(torch.cat([quiet, loud]), codes, absmax, threshold=6.0, backend=backend)[:1]
    assert not torch.equal(alone, beside)
    exact = quiet.double() @ dequantized(codes, absmax).t()
    assert (beside - exact).abs().max() < (alone - exact).abs().max()


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40), (2, 1, 3, 40)])
@pytest.mark.parametrize("group", [None, 32])
def test_gradients(backend, shape, group):
    codes, absmax = layer(10, 40)
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(10, requires_grad=True)
    y = int8_linear(x, codes, absmax, bias, threshold=2.0, activation_group=group, backend=backend)
    grad = torch.randn(y.shape)
    y.backward(grad)
    torch.testing.assert_close(x.grad.double(), grad.double() @ dequantized(codes, absmax), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, grad.reshape(-1, 10).sum(0))


def test_an_adapter_learns_on_a_frozen_base():
    torch.manual_seed(0)
    codes, absmax = layer(16, 16)
    before = codes.clone()
    target = torch.randn(16, 16) * 0.3
    down, up = torch.randn(4, 16, requires_grad=True), torch.zeros(16, 4, requires_grad=True)
    optimizer = torch.optim.Adam([down, up], lr=0.02)
    losses = []
    for _ in range(120):
        x = torch.randn(32, 16)
        y = int8_linear(x, codes, absmax) + x @ down.t() @ up.t()
        loss = (y - x @ (dequantized(codes, absmax).float() + target).t()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    assert torch.equal(codes, before)


@pytest.mark.parametrize("define", ["EFF_EMULATE_VNNI", "EFF_NO_VNNI", "EFF_NO_TILES", "EFF_GENERIC"])
def test_code_paths_of_other_processors(define, monkeypatch):
    """Paths that this processor would not take, compiled for it; loading runs the self test on top."""
    if native.unavailable():
        pytest.skip(native.unavailable())
    from eff_kernels.ops.int8_linear import cpu

    library = native.library(define, *(["EFF_NO_VNNI"] if define == "EFF_GENERIC" else []))
    kernel = library.eff_int8_linear
    kernel.argtypes, kernel.restype = cpu._kernel().argtypes, cpu._kernel().restype
    for k in (77, 400):
        codes, absmax = layer(45, k)  # a whole tile of outputs and a part of one
        outliers = ((0.0, False), (6.0, False), (6.0, True))
        for m, (threshold, per_token), group in itertools.product((1, 2, 4, 35, 66), outliers, (None, 32, 64, 160)):
            x = torch.randn(m, k) * 2.5
            options = {
                "threshold": threshold, "per_token_outliers": per_token, "activation_group": group, "backend": "cpu"
            }  # fmt: skip
            wanted = int8_linear(x, codes, absmax, **options)
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "_kernel", lambda: kernel)
                actual = int8_linear(x, codes, absmax, **options)
                if not threshold or per_token:  # else a row's columns depend on the other rows
                    assert torch.equal(actual[:1], int8_linear(x[:1], codes, absmax, **options))
            if define == "EFF_NO_TILES":  # a prompt on tiles and a token on vectors are the same sums
                assert torch.equal(actual, wanted)
            torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"\[2, 5\]"),
        ({"weight": torch.ones(3, 4)}, TypeError, "float32"),
        ({"absmax": torch.ones(4)}, ValueError, r"\[4\]"),
        ({"absmax": torch.ones(3).half()}, TypeError, "float16"),
        ({"bias": torch.ones(2)}, ValueError, r"\[2\]"),
        ({"x": torch.ones(2, 4, dtype=torch.int8)}, TypeError, "int8"),
        ({"threshold": -6.0}, ValueError, "-6"),
        ({"activation": "static"}, ValueError, "static"),
        ({"activation_group": 48}, ValueError, "multiple of 32 or None, got 48"),
        ({"activation_group": 0}, ValueError, "got 0"),
        ({"activation_group": 32, "activation": "none"}, ValueError, "activation_group=32 with activation='none'"),
        ({"backend": "gpu"}, ValueError, "gpu"),
    ],
)
def test_errors_name_what_they_saw(change, error, message):
    call = {"x": torch.ones(2, 4), "weight": torch.ones(3, 4, dtype=torch.int8), "absmax": torch.ones(3), **change}
    with pytest.raises(error, match=message):
        int8_linear(**call)


def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.int8_linear.triton")


@pytest.mark.skipif(not triton_interprets(), reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 40, 70), (70, 33, 300), (130, 129, 96), (1, 5, 0)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 2.0},
        {"threshold": 2.0, "per_token_outliers": True},
        {"activation_group": 32},
        {"activation_group": 64, "threshold": 2.0},
        {"activation_group": 96, "threshold": 2.0, "per_token_outliers": True},
        {"activation": "none"},
    ],
)
def test_triton_equals_the_reference_in_each_configuration(dtype, m, n, k, options):
    """Every block size that is chosen by the number of rows, with borders inside a block."""
    codes, absmax = layer(n, k)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    actual = int8_linear(x, codes, absmax, bias, backend="triton", out_dtype=torch.float32, **options)
    wanted = int8_linear(x, codes, absmax, bias, backend="reference", out_dtype=torch.float32, **options)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-4)


def test_memory_that_runs_out_amid_outliers_is_an_error():
    if native.unavailable():
        pytest.skip(native.unavailable())
    codes, absmax = layer(20, 96)
    x = torch.randn(3, 96)
    x[:, 5], x[1, 70] = 40.0, -30.0
    wanted = int8_linear(x, codes, absmax, threshold=6.0, backend="cpu")
    limit = native.library().eff_limit_scratch
    limit.argtypes, limit.restype = [ctypes.c_int64], None
    refused = 0
    try:
        for requests in range(16):
            limit(requests)
            try:
                found = int8_linear(x, codes, absmax, threshold=6.0, backend="cpu")
            except MemoryError:
                refused += 1
                continue
            assert torch.equal(found, wanted)
    finally:
        limit(-1)
    assert refused >= 2  # the codes of x, and the columns of outliers

import math

import pytest
import torch
import torch.nn.functional as F
from eff_kernels.ops.rms_norm import AddRMSNorm, add_rms_norm, api, autograd, reference, rms_norm
from eff_kernels.ops.rms_norm.specs import SPECS, with_residual
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.budget import assert_within_budget
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = [b.name for b in api.OP.backends]


class TestRMSNorm(OpTests):
    function = staticmethod(rms_norm)
    reference = staticmethod(reference.rms_norm)
    op = api.OP
    specs = SPECS
    differentiable = ("x", "weight")


class TestAddRMSNorm(OpTests):
    function = staticmethod(add_rms_norm)
    reference = staticmethod(reference.add_rms_norm)
    op = api.ADD_OP
    specs = tuple(with_residual(s) for s in SPECS)
    differentiable = ("x", "residual", "weight")


def test_worked_example():
    # The root mean square of (3, 4) is sqrt(12.5).
    y = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    torch.testing.assert_close(y, torch.tensor([[3 / math.sqrt(12.5), 8 / math.sqrt(12.5)]]))


def test_reference_is_that_of_pytorch():
    x, weight = torch.randn(7, 33, dtype=torch.float64), torch.randn(33, dtype=torch.float64)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (33,), weight, 1e-5))


def test_reference_backward_is_the_derivative():
    x, weight = (t.requires_grad_() for t in (torch.randn(4, 9).double(), torch.randn(9).double()))
    grad, more = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    wanted = torch.autograd.grad((reference.rms_norm(x, weight, 1e-3), x * 1), (x, weight), (grad, more))
    actual = reference.rms_norm_backward(grad, x.detach(), weight.detach(), 1e-3, more)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("power", [-20, -3, 5])
def test_scale_of_a_row_cancels(power):
    x, weight = torch.randn(3, 64), torch.randn(64)
    torch.testing.assert_close(rms_norm(x * 2.0**power, weight, eps=0.0), rms_norm(x, weight, eps=0.0))


def test_zeros_stay_zeros():
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8)), torch.zeros(2, 8))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, under Triton's interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_stay_in_their_row(backend):
    x = torch.randn(4, 40)
    x[1, 3], x[2, 5] = math.nan, math.inf
    y = rms_norm(x, torch.ones(40), backend=backend)
    assert y[1].isnan().all()
    assert y[2, 5].isnan()
    assert torch.equal(y[[0, 3]], rms_norm(x[[0, 3]], torch.ones(40), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_float16_values_do_not_overflow(backend):
    x = torch.full((2, 64), 30000.0, dtype=torch.float16)  # the square is far above the largest float16
    y = rms_norm(x, torch.ones(64, dtype=torch.float16), backend=backend)
    assert torch.equal(y, torch.ones_like(y))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_of_another_dtype(backend, dtype, weight_dtype):
    x = torch.randn(5, 300).to(dtype).requires_grad_()
    weight = torch.randn(300).to(weight_dtype).requires_grad_()
    y = rms_norm(x, weight, backend=backend)
    assert_within_budget(y, reference.rms_norm, (x, weight, 1e-6))
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, weight), grad)
    assert_within_budget(actual, reference.rms_norm_backward, (grad, x, weight, 1e-6, None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_residual_is_rounded_before_the_norm(backend):
    x, residual = torch.randn(3, 128).bfloat16(), torch.randn(3, 128).bfloat16()
    weight = torch.rand(128).bfloat16()
    result = add_rms_norm(x, residual, weight, backend=backend)
    assert isinstance(result, AddRMSNorm)
    if backend != "triton":  # its interpreter truncates where a GPU rounds
        assert torch.equal(result.residual, x + residual)
    assert_within_budget(result.output, reference.rms_norm, (result.residual, weight, 1e-6))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", ["output", "residual"])
def test_gradient_when_only_one_result_is_used(backend, used):
    x, residual = (torch.randn(3, 16, requires_grad=True) for _ in range(2))
    weight = torch.rand(16, requires_grad=True)
    grads = []
    both = (
        add_rms_norm(x, residual, weight, eps=1e-6, backend=backend),
        reference.add_rms_norm(x, residual, weight, 1e-6),
    )
    for output, total in both:
        loss = (output if used == "output" else total).square().sum()
        grads.append(torch.autograd.grad(loss, (x, residual, weight), materialize_grads=True))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_with_gaps(backend):
    x, weight, grad = torch.randn(5, 24), torch.rand(48)[::2], torch.randn(5, 24)
    args = (grad, x, weight, 1e-6, None)
    actual = autograd.BACKWARD_OP(*args, backend=backend)
    assert_within_budget(actual, reference.rms_norm_backward, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_dtype_changes_nothing(backend):
    args = (torch.randn(40, 24), torch.randn(40, 24), torch.rand(24), 1e-6, None)
    wanted = autograd.BACKWARD_OP(*args, backend=backend)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as transformers does while it builds a model
    try:
        found = autograd.BACKWARD_OP(*args, backend=backend)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_frozen_weight():
    x, weight = torch.randn(3, 16, requires_grad=True), torch.rand(16)
    rms_norm(x, weight).sum().backward()
    assert weight.grad is None
    (wanted,) = torch.autograd.grad(rms_norm(x, weight.clone().requires_grad_()).sum(), x)
    torch.testing.assert_close(x.grad, wanted)


def test_many_rows_give_the_weight_one_repeatable_gradient():
    x, grad, weight = torch.randn(1000, 24), torch.randn(1000, 24), torch.rand(24)
    args = (grad, x, weight, 1e-6, None)
    actual = autograd.BACKWARD_OP(*args)
    assert_within_budget(actual, reference.rms_norm_backward, args)
    assert torch.equal(actual[1], autograd.BACKWARD_OP(*args)[1])


def test_threads_do_not_change_the_bits():
    x, weight = torch.randn(400, 576), torch.rand(576)
    one = rms_norm(x, weight)
    torch.set_num_threads(2)
    try:
        assert torch.equal(rms_norm(x, weight), one)
    finally:
        torch.set_num_threads(1)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 9), d=st.integers(1, 700), eps=st.floats(1e-8, 10), seed=st.integers(0, 99))
def test_any_shape(rows, d, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, d, generator=generator), torch.randn(d, generator=generator)
    assert_within_budget(rms_norm(x, weight, eps=eps), reference.rms_norm, (x, weight, eps))


def test_long_rows_are_refused_by_triton_with_the_limit():
    x = torch.zeros(1, 20000)
    reason = api.OP.explain(x, x[0], 1e-6).reasons["triton"]
    assert reason
    assert "16384" in reason or "needs a CUDA" in reason


@pytest.mark.parametrize(
    ("x", "weight", "error", "text"),
    [
        (torch.zeros(2, 8), torch.ones(7), ValueError, r"shape \[8\].*got \[7\]"),
        (torch.zeros(2, 8), torch.ones(1, 8), ValueError, r"got \[1, 8\]"),
        (torch.zeros(()), torch.ones(1), ValueError, "at least one dimension"),
        (torch.zeros(2, 8, dtype=torch.int64), torch.ones(8), TypeError, "torch.int64"),
    ],
)
def test_wrong_arguments(x, weight, error, text):
    with pytest.raises(error, match=text):
        rms_norm(x, weight)
    with pytest.raises(error, match=text):
        add_rms_norm(x, x, weight)


def test_residual_must_be_like_x():
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"\[2, 8\] and \[1, 8\]"):
        add_rms_norm(x, x[:1], weight)
    with pytest.raises(TypeError, match=r"torch\.bfloat16"):
        add_rms_norm(x, x.bfloat16(), weight)


@pytest.mark.timeout(600)
def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.rms_norm.triton")

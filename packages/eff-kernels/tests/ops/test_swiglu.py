import math

import pytest
import torch
import torch.nn.functional as F
from eff_kernels.ops.swiglu import api, autograd, reference, swiglu
from eff_kernels.ops.swiglu.specs import SPECS
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.budget import assert_within_budget
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = [b.name for b in api.OP.backends]
INTERPRETER_WARNINGS = "ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning"


class TestSwiGLU(OpTests):
    function = staticmethod(swiglu)
    reference = staticmethod(reference.swiglu)
    op = api.OP
    specs = SPECS
    differentiable = ("gate", "up")


def test_worked_example():
    # silu(ln 3) = ln 3 * 3 / 4
    y = swiglu(torch.tensor([math.log(3.0), 0.0]), torch.tensor([4.0, 5.0]))
    torch.testing.assert_close(y, torch.tensor([3 * math.log(3.0), 0.0]))


def test_reference_is_that_of_pytorch():
    gate, up = torch.randn(2, 50, 20, dtype=torch.float64)
    torch.testing.assert_close(reference.swiglu(gate, up), F.silu(gate) * up)


def test_reference_backward_is_the_derivative():
    gate, up = (torch.randn(4, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grad = torch.randn(4, 9, dtype=torch.float64)
    wanted = torch.autograd.grad(reference.swiglu(gate, up), (gate, up), grad)
    torch.testing.assert_close(reference.swiglu_backward(grad, gate.detach(), up.detach()), wanted)


@pytest.mark.filterwarnings(INTERPRETER_WARNINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_range_of_the_exponential(backend):
    # Steps of 1/64 from where float32 silu is zero to where it is the identity: every exponent that is met.
    gate = torch.arange(-110, 110, 1 / 64)
    up = torch.ones_like(gate)
    y = swiglu(gate, up, backend=backend)
    assert_within_budget(y, reference.swiglu, (gate, up))
    wanted = reference.swiglu(gate.double(), up.double())
    normal = wanted.abs() > 1e-36
    relative = ((y.double() - wanted) / wanted)[normal].abs().max()
    assert relative < 6 * torch.finfo(torch.float32).eps  # exp: 2, 1 + e: 1, division: 1, two products: 2


@pytest.mark.filterwarnings(INTERPRETER_WARNINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinities(backend):
    gate = torch.tensor([math.nan, math.inf, -math.inf, -200.0, 200.0, 1.0, 2.0])
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, math.nan, -math.inf])
    y = swiglu(gate, up, backend=backend)
    assert_within_budget(y, reference.swiglu, (gate, up))
    assert y.isnan().tolist() == [True, False, True, False, False, True, False]
    assert y[[1, 3, 4, 6]].tolist() == [math.inf, 0.0, 200.0, -math.inf]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_of_a_fused_projection(backend, dtype):
    both = torch.randn(3, 5, 2 * 40).to(dtype)
    gate, up = both.chunk(2, -1)
    actual = swiglu(gate, up, backend=backend)
    assert actual.is_contiguous()
    assert_within_budget(actual, reference.swiglu, (gate, up))


def test_backward_with_strided_gradient():
    gate, up, grad = torch.randn(5, 40), torch.randn(5, 40), torch.randn(40, 5).t()
    args = (grad, gate, up)
    for backend in BACKENDS:
        assert_within_budget(autograd.BACKWARD_OP(*args, backend=backend), reference.swiglu_backward, args)


def test_threads_do_not_change_the_bits():
    gate, up = torch.randn(60, 1536), torch.randn(60, 1536)
    one = swiglu(gate, up)
    torch.set_num_threads(2)
    try:
        assert torch.equal(swiglu(gate, up), one)
    finally:
        torch.set_num_threads(1)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(0, 6), d=st.integers(1, 700), scale=st.floats(0.01, 50), seed=st.integers(0, 99))
def test_any_shape(rows, d, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    gate, up = scale * torch.randn(rows, d, generator=generator), torch.randn(rows, d, generator=generator)
    assert_within_budget(swiglu(gate, up), reference.swiglu, (gate, up))


@pytest.mark.parametrize(
    ("gate", "up", "error", "text"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 7), ValueError, r"\[2, 8\] and \[2, 7\]"),
        (torch.zeros(2, 8), torch.zeros(8), ValueError, r"\[2, 8\] and \[8\]"),
        (torch.zeros(()), torch.zeros(()), ValueError, r"one shape \[\.\.\., d\]"),
        (torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float16), TypeError, r"torch\.float32 and torch\.float16"),
        (torch.zeros(2, 8).int(), torch.zeros(2, 8).int(), TypeError, r"torch\.int32"),
    ],
)
def test_wrong_arguments(gate, up, error, text):
    with pytest.raises(error, match=text):
        swiglu(gate, up)


@pytest.mark.timeout(600)
def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.swiglu.triton")

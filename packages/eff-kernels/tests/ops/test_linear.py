import pytest
import torch
from eff_kernels.ops.linear import api, linear, reference
from eff_kernels.ops.linear.specs import SPECS
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class TestLinear(OpTests):
    function = staticmethod(linear)
    reference = staticmethod(reference.linear)
    op = api.OP
    specs = SPECS
    differentiable = ("x", "weight", "bias")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    x = torch.tensor([[1.0, -2.0, 0.5]])
    weight = torch.tensor([[2.0, 1.0, 4.0], [0.25, 0.0, -8.0]], dtype=torch.bfloat16)
    assert linear(x, weight, torch.tensor([0.5, 1.0])).tolist() == [[2.5, -2.75]]


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 60),
    k=st.one_of(st.integers(1, 70), st.integers(1000, 1100)),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_a_row_has_the_same_bits_in_every_batch(m, n, k, dtype, weight_dtype, data):
    x, weight = draw(m, k).to(dtype), draw(n, k, seed=1).to(weight_dtype)
    whole = linear(x, weight, backend="cpu")
    first = data.draw(st.integers(0, m - 1))
    count = data.draw(st.integers(1, m - first))
    assert torch.equal(linear(x[first : first + count], weight, backend="cpu"), whole[first : first + count])
    some = data.draw(st.integers(1, n))
    assert torch.equal(linear(x, weight[:some], backend="cpu"), whole[:, :some])


def test_threads_change_no_bit():
    x, weight = draw(40, 300), draw(500, 300, seed=1).bfloat16()
    once = linear(x, weight, backend="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(linear(x, weight, backend="cpu"), once)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k", [1, 7, 8, 1023, 1024, 1025, 4100])
def test_error_stays_within_that_of_a_sum_in_float32(k):
    x, weight = draw(3, k), draw(13, k, seed=1)
    wide = x.double() @ weight.double().t()
    bound = (x.abs().double() @ weight.abs().double().t()) * (k / 8 + 12) * 2**-24
    assert ((linear(x, weight, backend="cpu") - wide).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_spoil_their_row_alone(bad):
    x = draw(5, 40)
    x[3, 11] = bad
    y = linear(x, draw(9, 40, seed=1), backend="cpu")
    assert not y[3].isfinite().any()
    assert y[[0, 1, 2, 4]].isfinite().all()


def test_leading_dimensions():
    x, weight = draw(2, 3, 8), draw(4, 8, seed=1)
    assert torch.equal(linear(x, weight), linear(x.view(6, 8), weight).view(2, 3, 4))
    assert linear(x[0, 0], weight).shape == (4,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(2, 5)}, ValueError, r"\[2, 5\]"),
        ({"weight": torch.ones(4)}, ValueError, r"\[4\]"),
        ({"weight": torch.ones(3, 4).int()}, TypeError, "weight.*int32"),
        ({"bias": torch.ones(2)}, ValueError, r"\[3\], got \[2\]"),
        ({"x": torch.ones(2, 4).long()}, TypeError, "x.*int64"),
    ],
)
def test_errors_name_what_they_saw(change, error, message):
    with pytest.raises(error, match=message):
        linear(**{"x": torch.ones(2, 4), "weight": torch.ones(3, 4), **change})

import math
from typing import NamedTuple

import pytest
import torch
from eff_kernels.testing import assert_within_budget, compare, to_float64, within_budget


def softplus(x):
    return torch.log1p(torch.exp(x))


X = torch.linspace(-3, 3, 200)


def test_reference_itself_and_the_rounded_truth_pass():
    assert_within_budget(softplus(X), softplus, (X,))
    low = X.bfloat16()
    assert_within_budget(softplus(low.double()).bfloat16(), softplus, (low,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_wrong_value_fails_with_its_place_and_numbers(dtype):
    x = X.to(dtype)
    y = softplus(x)
    y[137] += 64 * torch.finfo(dtype).eps * float(y.abs().max())
    with pytest.raises(AssertionError, match=r"over its error budget(.|\n)*at \[137\]: got .* float64 .* eager"):
        assert_within_budget(y, softplus, (x,))


def test_small_bias_in_all_values_fails_by_the_root_mean_square():
    # bfloat16 values whose own error is far larger at one place hide a bias from the largest error alone.
    truth = torch.ones(1000, dtype=torch.float64)
    eager = truth.clone().bfloat16()
    eager[0] = 1.5
    biased = torch.full((1000,), 1.0625).bfloat16()
    problem = compare(biased, eager, truth)
    assert "relative RMS" in problem
    assert "largest error" not in problem


def test_error_twice_that_of_the_reference_is_the_limit():
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    error = torch.full((100,), 1e-3, dtype=torch.float64)
    eager = (truth + error).float()
    assert compare((truth + 1.9 * error).float(), eager, truth) is None
    assert compare((truth + 2.1 * error).float(), eager, truth) is not None
    assert compare((truth + 2.1 * error).float(), eager, truth, factor=2.2) is None


def test_few_values_have_a_wider_budget():
    truth = torch.ones(1, dtype=torch.float64)
    eager, near = torch.ones(1), torch.ones(1) + 3 * torch.finfo(torch.float32).eps
    assert compare(near, eager, truth) is None  # the reference is exact by chance
    assert compare(near.expand(100), eager.expand(100), truth.expand(100)) is not None


@pytest.mark.parametrize(
    ("actual", "eager", "passes"),
    [
        ([math.nan, 1.0], [math.nan, 1.0], True),
        ([math.inf, 1.0], [math.inf, 1.0], True),
        ([math.nan, 1.0], [1.0, 1.0], False),
        ([1.0, 1.0], [math.nan, 1.0], False),
        ([math.inf, 1.0], [1.0, 1.0], False),
        ([-math.inf, 1.0], [math.inf, 1.0], False),
        ([math.nan, 1.0], [math.inf, 1.0], False),
        ([math.nan, 2.0], [math.nan, 1.0], False),  # the finite ones still count
        ([math.nan, math.nan], [math.nan, math.nan], True),
    ],
)
def test_nan_and_infinity_must_be_where_the_reference_has_them(actual, eager, passes):
    problem = compare(torch.tensor(actual), torch.tensor(eager), torch.tensor(eager).double())
    assert (problem is None) is passes


def test_next_to_the_largest_number_overflow_is_a_matter_of_rounding():
    most = torch.finfo(torch.float16).max
    truth = torch.tensor([most * 1.0002], dtype=torch.float64)
    eager, actual = torch.tensor([most]).half(), torch.tensor([math.inf]).half()
    assert compare(actual, eager, truth) is None
    assert compare(actual, torch.tensor([most / 2]).half(), truth / 2) is not None


def test_zeros_must_be_zeros():
    zeros = torch.zeros(100)
    assert compare(zeros, zeros, zeros.double()) is None
    assert compare(zeros + 1e-30, zeros, zeros.double()) is not None


def test_shape_and_dtype():
    one = torch.ones(2)
    assert "shape [2, 1], wanted [2]" in compare(one[:, None], one, one.double())
    assert "torch.float16, wanted torch.float32" in compare(one.half(), one, one.double())
    assert compare(one[:0], one[:0], one[:0].double()) is None


def test_integers_must_be_equal_but_for_the_allowed_steps():
    codes = torch.tensor([1, 2, 3], dtype=torch.int8)
    other = torch.tensor([1, 3, 3], dtype=torch.int8)
    assert compare(codes, codes, codes) is None
    assert "1 of 3 values differ by more than 0, the first at [1]: got 3, wanted 2" in compare(other, codes, codes)
    assert compare(other, codes, codes, integer_steps=1) is None
    low, high = torch.tensor([-128], dtype=torch.int8), torch.tensor([127], dtype=torch.int8)
    assert compare(low, high, high, integer_steps=1) is not None  # 255 steps, not one around the corner


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor | None


def test_each_of_several_outputs_is_named():
    good, bad = torch.ones(100), torch.full((100,), 1.1)
    assert within_budget(Pair(good, None), Pair(good, None), Pair(good.double(), None)) == []
    problems = within_budget(Pair(good, bad), Pair(good, good), Pair(good.double(), good.double()))
    assert len(problems) == 1
    assert problems[0].startswith("second (torch.float32, [100])")
    assert within_budget((good,), (good, good), (good.double(),) * 2) == [
        "1 outputs, the reference gives 2, in float64 2",
    ]


def test_to_float64_goes_through_containers_and_dtypes():
    tree = {"a": (torch.ones(1).half(), 3, None), "b": [torch.ones(1, dtype=torch.int8)], "c": torch.bfloat16}
    wide = to_float64(tree)
    assert wide["a"][0].dtype == torch.float64
    assert wide["a"][1:] == (3, None)
    assert wide["b"][0].dtype == torch.int8
    assert wide["c"] is torch.float64
    assert to_float64(torch.int8) is torch.int8
    assert isinstance(to_float64(Pair(torch.ones(1), None)), Pair)

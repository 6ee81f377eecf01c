"""The interval of a mean."""

import numpy as np
import pytest
from eff_kernels.testing import mean_interval


def test_equal_values_leave_no_doubt():
    assert mean_interval([0.5] * 9) == [0.5, 0.5, 0.5]


def test_the_interval_is_that_of_the_central_limit():
    values = np.random.default_rng(1).normal(3, 2, 400)
    mean, low, high = mean_interval(values, digits=6)
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean(), abs=1e-6)
    assert (mean - low, high - mean) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_what_is_no_list_of_numbers(values):
    with pytest.raises(ValueError, match="list of one number or more"):
        mean_interval(values)

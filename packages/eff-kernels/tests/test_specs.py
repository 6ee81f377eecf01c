import pytest
import torch
from eff_kernels.testing import NON_CONTIGUOUS, Spec, padded_rows, strided_columns, swapped_dims

SPEC = Spec("one", lambda draw: (draw.normal(3, 4), draw.uniform(5, low=2, high=3), draw.integers(6, low=0, high=9)))


def test_values_are_fixed_by_name_dtype_and_seed():
    first, again, other = SPEC.args(torch.float32), SPEC.args(torch.float32), SPEC.args(torch.float32, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    renamed = Spec("two", SPEC.make).args(torch.float32)
    assert not torch.equal(first[0], renamed[0])
    assert torch.equal(SPEC.args(torch.bfloat16)[0], first[0].bfloat16())


def test_draws_do_not_touch_the_global_generator():
    state = torch.get_rng_state()
    SPEC.args(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_ranges_and_dtypes():
    x, u, i = SPEC.args(torch.float16)
    assert (x.dtype, u.dtype, i.dtype) == (torch.float16, torch.float16, torch.int64)
    assert ((u >= 2) & (u <= 3)).all()
    assert ((i >= 0) & (i < 9)).all()
    assert SPEC.args(torch.float32, "meta")[0].device.type == "meta"


@pytest.mark.parametrize("name", NON_CONTIGUOUS)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_layouts_keep_the_values(name, shape, dtype):
    x = (torch.randn(shape) * 10).to(dtype)
    y = NON_CONTIGUOUS[name](x)
    assert torch.equal(x, y)
    assert y.dtype == dtype
    assert y.numel() < 2 or not y.is_contiguous() or name == "padded_rows"


def test_layouts_lie_as_they_say():
    x = torch.randn(3, 5)
    assert padded_rows(x).stride() == (11, 1)
    assert strided_columns(x).stride() == (10, 2)
    assert swapped_dims(x).stride() == (1, 3)


def test_what_lies_around_a_row_is_nan():
    view = padded_rows(torch.zeros(3, 5))
    around = view.as_strided((3 * 11,), (1,), 0)
    assert int(around.isnan().sum()) == 3 * 6
    assert around[2].isnan()
    assert around[8].isnan()
    codes = padded_rows(torch.zeros(3, 5, dtype=torch.int8))
    assert codes.as_strided((1,), (1,), 0).item() == 127


def test_scalars_have_no_layout():
    assert all(f(torch.tensor(2.0)) == 2.0 for f in NON_CONTIGUOUS.values())

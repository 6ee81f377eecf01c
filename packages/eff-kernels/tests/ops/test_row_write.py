import pytest
import torch
from eff_kernels import row_write
from hypothesis import given
from hypothesis import strategies as st


@given(
    rows=st.integers(1, 40),
    outer=st.integers(0, 5),
    inner=st.integers(1, 4),
    d=st.sampled_from([1, 8, 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    layout=st.sampled_from(["contiguous", "apart", "transposed", "columns"]),
    seed=st.integers(0, 1000),
)
def test_equals_index_copy(rows, outer, inner, d, dtype, layout, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = max(rows, outer * inner)
    table = torch.randn(rows, d, generator=generator).to(dtype)
    values = {
        "contiguous": lambda: torch.randn(outer, inner, d, generator=generator),
        "apart": lambda: torch.randn(outer, inner + 3, d, generator=generator)[:, 2 : 2 + inner],
        "transposed": lambda: torch.randn(inner, outer, d, generator=generator).transpose(0, 1),
        "columns": lambda: torch.randn(outer, d, inner, generator=generator).transpose(1, 2),
    }[layout]().to(dtype)
    at = torch.randperm(rows, generator=generator)[: outer * inner]
    wanted = table.clone().index_copy_(0, at, values.reshape(-1, d))
    row_write(table, at, values)
    assert torch.equal(table, wanted)


@pytest.mark.parametrize("bad", [-1, 5])
def test_rows_outside_are_refused_and_nothing_is_written(bad):
    table = torch.zeros(5, 8)
    with pytest.raises(IndexError, match=f"from 0 to 4, got {min(bad, 1)} to {max(bad, 1)}"):
        row_write(table, torch.tensor([1, bad]), torch.ones(2, 1, 8))
    assert not table.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(5, 8), torch.tensor([1]), torch.ones(1, 8)), ValueError, "do not fit"),
        ((torch.zeros(5, 8), torch.tensor([1]), torch.ones(1, 1, 4)), ValueError, "do not fit"),
        ((torch.zeros(8, 5).t(), torch.tensor([1]), torch.ones(1, 1, 8)), ValueError, "contiguous"),
        ((torch.zeros(5, 8), torch.tensor([1, 2]), torch.ones(1, 1, 8)), ValueError, r"\[1\], got \[2\]"),
        ((torch.zeros(5, 8), torch.tensor([1]).int(), torch.ones(1, 1, 8)), TypeError, "int32"),
        ((torch.zeros(5, 8), torch.tensor([1]), torch.ones(1, 1, 8).half()), TypeError, "float16"),
    ],
)
def test_errors_name_what_they_saw(arguments, error, message):
    with pytest.raises(error, match=message):
        row_write(*arguments)

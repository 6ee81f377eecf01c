import pytest
import torch
from eff_kernels import attention_columns, native
from eff_kernels.ops.attention_columns import api
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 9, 3, 130, 130, 64),
    (2, 4, 2, 37, 37, 32),
    (1, 4, 4, 5, 61, 16),
    (2, 6, 2, 33, 100, 48),
    (1, 3, 1, 1, 1, 32),
]


def drawn(shape, dtype, seed=0):
    batch, heads, kv, count, keys, d = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, count, heads, d, generator=generator).mul(2).to(dtype).transpose(1, 2)
    return q, torch.randn(batch, kv, 2 * keys, d, generator=generator).mul(2).to(dtype)[:, :, :keys]


def check(q, k, heads, scale=0.125):
    group, gap = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT * scale
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(gap + 1), -torch.inf)
    scores = scores if heads is None else scores[:, heads]
    found = attention_columns(q, k, scale=scale, heads=heads)
    torch.testing.assert_close(found.sums.double(), scores.softmax(-1).sum(2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=5e-5)
    known = attention_columns(q, k, scale=scale).lse.float().mT.contiguous().mT  # by other strides than its own
    again = attention_columns(q, k, scale=scale, heads=heads, lse=known)
    torch.testing.assert_close(again.sums, found.sums, rtol=1e-4, atol=1e-6)
    assert torch.equal(again.lse, known if heads is None else known[:, heads]) or q.dtype == torch.float64


@settings(deadline=None)  # the first call compiles
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    some=st.booleans(),
    scale=st.sampled_from([0.125, -0.1, 0.0, 0.4]),
    seed=st.integers(0, 1000),
)
def test_equal_float64(shape, dtype, some, scale, seed):
    check(*drawn(shape, dtype, seed), [shape[1] - 1, 0] if some else None, scale)


@pytest.mark.parametrize("define", ["EFF_GENERIC", "EFF_NO_AVX512"])
def test_other_processors(define, monkeypatch):
    if reason := native.unavailable():
        pytest.skip(reason)
    library = native.library(define)
    monkeypatch.setattr("eff_kernels.native.call.library", lambda: library)
    api._kernel.cache_clear()
    try:
        for dtype in DTYPES:
            for shape in SHAPES:
                check(*drawn(shape, dtype), None)
    finally:
        api._kernel.cache_clear()


def test_rows_sum_to_one_and_threads_change_nothing():
    q, k = drawn((1, 9, 3, 300, 300, 64), torch.bfloat16)
    threads = torch.get_num_threads()
    one = attention_columns(q, k)
    torch.testing.assert_close(one.sums.sum(-1), torch.full((1, 9), 300.0), rtol=1e-5, atol=0)
    torch.set_num_threads(2)
    try:
        two = attention_columns(q, k)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.sums, two.sums)
    assert torch.equal(one.lse, two.lse)


def test_memory_that_is_not_there_is_said():
    if reason := native.unavailable():
        pytest.skip(reason)
    limit = native.library().eff_limit_scratch
    limit(0)
    try:
        with pytest.raises(MemoryError, match="attention_columns"):
            attention_columns(*drawn(SHAPES[1], torch.float32))
    finally:
        limit(-1)


def test_what_does_not_fit_is_refused():
    q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 5, 16)
    with pytest.raises(ValueError, match="Sq <= S"):
        attention_columns(torch.zeros(1, 4, 6, 16), k)
    with pytest.raises(ValueError, match="multiple of the key heads, 2"):
        attention_columns(torch.zeros(1, 3, 3, 16), k)
    with pytest.raises(ValueError, match=r"0\.\.3, got \[4\]"):
        attention_columns(q, k, heads=[4])

import pytest
import torch
from eff_kernels import native, row_scores, row_values
from eff_kernels.ops.attention_rows import api
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
SHAPES = [(1, 9, 3, 200, 64), (2, 4, 2, 65, 32), (3, 5, 1, 7, 8), (1, 6, 6, 130, 40), (2, 2, 1, 1, 20)]


def oracle(q, k, scale):
    return (k.double().repeat_interleave(q.shape[1] // k.shape[1], 1) @ q.double()[..., None])[..., 0] * scale


@settings(deadline=None)  # the first call compiles
@given(shape=st.sampled_from(SHAPES), query=DTYPES, cache=DTYPES, apart=st.booleans(), seed=st.integers(0, 1000))
def test_equal_float64(shape, query, cache, apart, seed):
    batch, heads, kv, keys, d = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, d, generator=generator).to(query)
    k = torch.randn(batch, kv, 2 * keys if apart else keys, d, generator=generator).to(cache)[:, :, :keys]
    scores = row_scores(q, k, 0.3)
    wide = torch.float64 in (query, cache)
    assert scores.dtype == (torch.float64 if wide else torch.float32)
    torch.testing.assert_close(scores.double(), oracle(q, k, 0.3), rtol=1e-5, atol=1e-5)
    weights = scores.softmax(-1)
    out = row_values(weights, k, torch.float32)
    wanted = weights.double()[:, :, None] @ k.double().repeat_interleave(heads // kv, 1)
    torch.testing.assert_close(out.double(), wanted[:, :, 0], rtol=1e-5, atol=1e-5)
    assert torch.equal(row_values(weights, k, query), row_values(weights, k, torch.float32).to(query)) or wide


@pytest.mark.parametrize("define", ["EFF_GENERIC", "EFF_NO_AVX512"])
def test_other_processors(define, monkeypatch):
    if reason := native.unavailable():
        pytest.skip(reason)
    library = native.library(define)
    monkeypatch.setattr("eff_kernels.native.call.library", lambda: library)
    for kernel in (api._scores, api._values):
        kernel.cache_clear()
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k = torch.randn(2, 9, 40).to(dtype), torch.randn(2, 3, 130, 40).to(dtype)
            scores = row_scores(q, k, 0.2)
            torch.testing.assert_close(scores.double(), oracle(q, k, 0.2), rtol=1e-5, atol=1e-5)
            out = row_values(scores, k, torch.float32).double()
            wanted = scores.double()[:, :, None] @ k.double().repeat_interleave(3, 1)
            torch.testing.assert_close(out, wanted[:, :, 0], rtol=1e-5, atol=1e-4)
    finally:
        for kernel in (api._scores, api._values):
            kernel.cache_clear()


def test_memory_that_is_not_there_is_said():
    if reason := native.unavailable():
        pytest.skip(reason)
    limit = native.library().eff_limit_scratch
    k = torch.zeros(1, 2, 4, 8)
    limit(0)
    try:
        with pytest.raises(MemoryError, match="row_scores"):
            row_scores(torch.zeros(1, 2, 8), k, 1.0)
        with pytest.raises(MemoryError, match="row_values"):
            row_values(torch.zeros(1, 2, 4), k, torch.float32)
    finally:
        limit(-1)


def test_shapes_that_do_not_fit_are_refused():
    k = torch.zeros(2, 3, 5, 8)
    for q in (torch.zeros(2, 4, 8), torch.zeros(2, 3, 16), torch.zeros(1, 3, 8), torch.zeros(3, 8)):
        with pytest.raises(ValueError, match="do not fit"):
            row_scores(q, k, 1.0)
    for weights in (torch.zeros(2, 4, 5), torch.zeros(2, 3, 6), torch.zeros(1, 3, 5), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match="do not fit"):
            row_values(weights, k, torch.float32)

import pytest
import torch
from eff_kernels import native, row_calibrated, row_scores, row_values
from eff_kernels.ops.attention_rows import Limits, api
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


def calibrated(q, k, v, old, limits, beta):
    """Output, sums, sinks, their number and weight in float64."""
    weights = oracle(q, k, 0.3).softmax(-1)
    sums = torch.nn.functional.pad(old.double(), (0, k.shape[2] - old.shape[2])) + weights
    sinks = (sums / limits.rows[:, None] > limits.bound[:, None, None]) & limits.may_be[:, None]
    if limits.spare_first:
        sinks &= sinks.cumsum(-1) > 1
    mass, rest = (torch.where(sinks == which, weights, 0.0).sum(-1, keepdim=True) for which in (True, False))
    changed = torch.where(sinks, beta * weights, weights * (1 + (1 - beta) * mass / rest))
    out = torch.where(rest > 0, changed, weights)[:, :, None] @ v.double().repeat_interleave(
        q.shape[1] // k.shape[1], 1
    )
    return out[:, :, 0], sums, sinks, sinks.sum((0, 2)), mass[..., 0].sum(0)


def drawn(shape, query, cache, spare, seed, bound=0.03):
    batch, heads, kv, keys, d = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, d, generator=generator).to(query)
    k, v = (torch.randn(batch, kv, 2 * keys, d, generator=generator).to(cache)[:, :, :keys] for _ in "kv")
    old = torch.rand(batch, heads, keys - 1, generator=generator) * torch.rand(keys - 1, generator=generator) ** 8
    rows = torch.randint(1, 9, (batch, keys), generator=generator)
    may_be = torch.rand(batch, keys, generator=generator) < 0.8
    return q, k, v, old, Limits(rows, may_be, torch.full((batch,), bound) + torch.arange(batch) / 100, spare)


def check_calibrated(*given):
    q, k, v, old, limits = drawn(*given)
    found, wanted = row_calibrated(q, k, v, 0.3, old, limits, 0.4), calibrated(q, k, v, old, limits, 0.4)
    assert torch.equal(found.sinks, wanted[2])
    assert torch.equal(found.number, wanted[3])
    for here, there in ((found.sums, wanted[1]), (found.mass, wanted[4])):
        torch.testing.assert_close(here.double(), there, rtol=1e-5, atol=1e-5)
    if not bool(wanted[3].any()):
        assert found.out is None
        return
    assert found.out.dtype == v.dtype
    close = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(v.dtype, 1e-5)
    torch.testing.assert_close(found.out.double(), wanted[0], rtol=close, atol=close)


@settings(deadline=None)
@given(shape=st.sampled_from(SHAPES), query=DTYPES, cache=DTYPES, spare=st.booleans(), seed=st.integers(0, 1000))
def test_a_calibrated_row_equals_float64(shape, query, cache, spare, seed):
    check_calibrated(shape, query, cache, spare, seed)


def test_a_row_without_sinks_has_no_output_and_one_of_sinks_alone_stays():
    q, k, v, old, limits = drawn(SHAPES[1], torch.float32, torch.float32, False, 0)
    none = limits._replace(may_be=torch.zeros_like(limits.may_be))
    found = row_calibrated(q, k, v, 0.3, old, none, 0.4)
    assert found.out is None
    assert not found.sinks.any()
    every = limits._replace(may_be=torch.ones_like(limits.may_be), bound=torch.zeros(2))
    found = row_calibrated(q, k, v, 0.3, old, every, 0.4)
    assert found.sinks.all()
    wanted = row_values(row_scores(q, k, 0.3).softmax(-1), v, torch.float32)
    torch.testing.assert_close(found.out, wanted)


@pytest.mark.parametrize("define", ["EFF_GENERIC", "EFF_NO_AVX512"])
def test_other_processors(define, monkeypatch):
    if reason := native.unavailable():
        pytest.skip(reason)
    library = native.library(define)
    monkeypatch.setattr("eff_kernels.native.call.library", lambda: library)
    for kernel in (api._scores, api._values, api._calibrated):
        kernel.cache_clear()
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            q, k = torch.randn(2, 9, 40).to(dtype), torch.randn(2, 3, 130, 40).to(dtype)
            scores = row_scores(q, k, 0.2)
            torch.testing.assert_close(scores.double(), oracle(q, k, 0.2), rtol=1e-5, atol=1e-5)
            out = row_values(scores, k, torch.float32).double()
            wanted = scores.double()[:, :, None] @ k.double().repeat_interleave(3, 1)
            torch.testing.assert_close(out, wanted[:, :, 0], rtol=1e-5, atol=1e-4)
            for spare in (False, True):
                check_calibrated(SHAPES[0], dtype, dtype, spare, 1)
    finally:
        for kernel in (api._scores, api._values, api._calibrated):
            kernel.cache_clear()


def test_memory_that_is_not_there_is_said():
    if reason := native.unavailable():
        pytest.skip(reason)
    limit = native.library().eff_limit_scratch
    k = torch.zeros(1, 2, 4, 8)
    limits = Limits(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool), torch.zeros(1))
    limit(0)
    try:
        with pytest.raises(MemoryError, match="row_scores"):
            row_scores(torch.zeros(1, 2, 8), k, 1.0)
        with pytest.raises(MemoryError, match="row_values"):
            row_values(torch.zeros(1, 2, 4), k, torch.float32)
        with pytest.raises(MemoryError, match="row_calibrated"):
            row_calibrated(torch.zeros(1, 2, 8), k, k, 1.0, torch.zeros(1, 2, 0), limits, 0.4)
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


def test_limits_and_sums_that_do_not_fit_are_refused():
    q, k, v, old, limits = drawn(SHAPES[1], torch.float32, torch.float32, False, 0)
    with pytest.raises(ValueError, match="do not fit"):
        row_calibrated(q, k, v[:, :, 1:], 0.3, old, limits, 0.4)
    with pytest.raises(ValueError, match="do not fit"):
        row_calibrated(q, k, v, 0.3, old[:, 1:], limits, 0.4)
    with pytest.raises(ValueError, match="limits must be for 2 sequences of 65 keys"):
        row_calibrated(q, k, v, 0.3, old, limits._replace(rows=limits.rows[:, 1:]), 0.4)

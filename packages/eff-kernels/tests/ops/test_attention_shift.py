import dataclasses

import pytest
import torch
from eff_kernels import Attended, can_shift, move_weights, native, scale_weights
from eff_kernels.ops.attention_shift import api, cpu, reference
from eff_kernels.ops.attention_shift.specs import MOVE_SPECS, SCALE_SPECS
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no compiler")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 9, 3, 130, 130, 64, 64), (2, 4, 2, 37, 37, 32, 48), (1, 4, 4, 5, 61, 16, 16), (2, 6, 2, 33, 100, 40, 24)]


def by_scale(q, k, v, out, lse, scale, columns, beta, heads, *, backend="auto"):
    return scale_weights(Attended(q, k, v, out, lse, scale), columns, beta, heads, backend=backend)


def by_moves(
    q, k, v, out, lse, scale, receivers, givers, others, asked, share, rho, least, by_sinks, *, backend="auto"
):
    options = {"share": share, "rho": rho, "least": least, "by_sinks": by_sinks, "backend": backend}
    return move_weights(Attended(q, k, v, out, lse, scale), receivers, givers, others, asked, **options)


class TestScaleWeights(OpTests):
    function = staticmethod(by_scale)
    reference = staticmethod(reference.scale_weights)
    op = api.SCALE_OP
    specs = SCALE_SPECS
    factor = 8.0  # what the output was rounded to is scaled as well, by up to 1 / 0.25


class TestMoveWeights(OpTests):
    function = staticmethod(by_moves)
    reference = staticmethod(reference.move_weights)
    op = api.MOVE_OP
    specs = MOVE_SPECS


def drawn(shape, dtype, seed=0, size=2.0):
    """Attention of random tensors, and its weights in float64."""
    batch, heads, kv, count, keys, d, dv = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, count, heads, d, generator=generator).mul(size).to(dtype).transpose(1, 2)
    k = torch.randn(batch, kv, 2 * keys, d, generator=generator).mul(size).to(dtype)[:, :, :keys]
    v = torch.randn(batch, kv, keys, dv, generator=generator).to(dtype)
    scores = q.double() @ k.double().repeat_interleave(heads // kv, 1).mT * 0.125
    scores = scores.masked_fill(torch.ones(count, keys, dtype=torch.bool).triu(keys - count + 1), -torch.inf)
    weights = scores.softmax(-1)
    out = (weights @ wide(v, heads)).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    lse = scores.logsumexp(-1).float().mT.contiguous().mT
    return Attended(q, k, v, out, lse, 0.125), weights


def wide(v, heads):
    return v.double().repeat_interleave(heads // v.shape[1], 1)


def close(found, weights, attended, sharp=False):
    wanted = weights @ wide(attended.v, attended.q.shape[1])
    # The digits that a log-sum-exp has behind its point are those of its weights.
    atol = {torch.float32: 3e-4 if sharp else 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}[attended.q.dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=atol, atol=atol)


def scaled(weights, columns, beta):
    of = columns[:, :, None]
    mass, rest = (torch.where(of == which, weights, 0.0).sum(-1, keepdim=True) for which in (True, False))
    return torch.where(rest > 1e-37, torch.where(of, beta * weights, weights * (1 + (1 - beta) * mass / rest)), weights)


def check_scaled(shape, dtype, share, beta, some, seed, size=2.0):
    attended, weights = drawn(shape, dtype, seed, size)
    heads = [shape[1] - 1, 0] if some else list(range(shape[1]))
    columns = torch.rand(shape[0], len(heads), shape[4], generator=torch.Generator().manual_seed(seed)) < share
    before = attended.out.clone()
    found = scale_weights(attended, columns, beta, heads)
    assert torch.equal(attended.out, before)
    wanted = weights.clone()
    wanted[:, heads] = scaled(weights[:, heads], columns, beta)
    close(found, wanted, attended, size > 2.0)
    untouched = (wanted == weights).all(-1)
    assert torch.equal(found[untouched], before[untouched])


@settings(deadline=None)  # the first call compiles
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.0, 0.03, 0.3, 0.95]),
    beta=st.sampled_from([0.0, 0.4, 0.9]),
    some=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_scaled_weights_equal_float64(shape, dtype, share, beta, some, seed):
    check_scaled(shape, dtype, share, beta, some, seed)


def moved_weights(weights, receivers, givers, others, asked, share, rho, least, by_sinks):
    def mass(mask):
        return torch.where(mask[:, None, None], weights, 0.0).sum(-1)

    good, bad, given_up = mass(receivers), mass(givers), mass(givers | others)
    images = (receivers | givers).sum(1)[:, None, None]
    looks = bad <= rho * (good + bad + 1e-6 * images) if by_sinks else good >= rho * (good + bad)
    select = asked[:, None] & looks & (good + bad >= least) & (good > 0)
    gain = torch.where(receivers[:, None, None], share * given_up[..., None] * weights / good[..., None], 0.0)
    loss = torch.where((givers | others)[:, None, None], share * weights, 0.0)
    changed = torch.where(select[..., None], weights + gain.nan_to_num() - loss, weights)
    # Queries at the very edge of a limit may fall to either side.
    edge = (bad - rho * (good + bad) if by_sinks else good - rho * (good + bad)).abs() < 1e-4
    return changed, select, share * given_up, edge | ((good + bad - least).abs() < 1e-4)


def check_moved(shape, dtype, by_sinks, seed):
    attended, weights = drawn(shape, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 7, (shape[0], shape[4]), generator=generator)
    asked = torch.rand(shape[0], shape[3], generator=generator) < 0.6
    masks = kind == 1, kind == 2, kind == 3
    settings = {"share": 0.6, "rho": 0.5, "least": 0.2, "by_sinks": by_sinks}
    out, counts = move_weights(attended, *masks, asked, **settings)
    wanted, select, moved, edge = moved_weights(weights, *masks, asked, *settings.values())
    close(torch.where(edge[..., None], attended.out, out), torch.where(edge[..., None], weights, wanted), attended)
    still = ~select & ~edge
    assert torch.equal(out[still], attended.out[still])
    low, high = ((select & ~edge).sum(-1), (select | edge).sum(-1))
    assert bool(((counts[..., 0] >= low) & (counts[..., 0] <= high)).all())
    slack = torch.where(edge, moved, 0.0).sum(-1) + 1e-3
    assert bool(((counts[..., 1] - torch.where(select, moved, 0.0).sum(-1)).abs() <= slack).all())


@settings(deadline=None, max_examples=40)
@given(shape=st.sampled_from(SHAPES), dtype=st.sampled_from(DTYPES), by_sinks=st.booleans(), seed=st.integers(0, 1000))
def test_moved_weights_equal_float64(shape, dtype, by_sinks, seed):
    check_moved(shape, dtype, by_sinks, seed)


def test_each_key_of_a_picture_is_allowed_for():
    """Givers with 3e-7 of 4e-7 are more than half of the picture's weight, and less with 1e-6 for each of two keys."""
    q, k = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16)
    q[..., 0], k[0, 0, 1:, 0] = 1.0, torch.tensor([1e-7, 3e-7]).log()
    attended = Attended(q, k, k, torch.zeros(1, 1, 3, 16), torch.tensor([[[0.0, 1e-7, 4e-7]]]), 1.0)
    masks = (torch.tensor([[name == kind for name in "tgb"]]) for kind in "gbo")
    last = torch.tensor([[False, False, True]])
    _, counts = move_weights(attended, *masks, last, share=0.5, rho=0.5, least=0.0, by_sinks=True)
    assert counts[0, 0, 0] == 1
    torch.testing.assert_close(counts[0, 0, 1], torch.tensor(1.5e-7, dtype=torch.float64), rtol=1e-4, atol=0)


def test_a_query_that_has_next_to_nothing_but_scaled_keys():
    # With sharp weights the rest of a row is far below the rounding of 1 - mass.
    for dtype in DTYPES:
        check_scaled(SHAPES[0], dtype, 0.5, 0.2, False, 3, size=3.5)


def test_a_row_of_scaled_keys_alone_stays():
    attended, weights = drawn(SHAPES[1], torch.float32)
    found = scale_weights(attended, torch.ones(2, 4, 37, dtype=torch.bool), 0.4)
    close(found, weights, attended)


@pytest.mark.parametrize("define", ["EFF_GENERIC", "EFF_NO_AVX512"])
def test_other_processors(define, monkeypatch):
    library = native.library(define)
    monkeypatch.setattr("eff_kernels.native.call.library", lambda: library)
    cpu._kernel.cache_clear()
    try:
        for dtype in DTYPES:
            for shape in SHAPES:
                check_scaled(shape, dtype, 0.3, 0.4, False, 1)
                check_moved(shape, dtype, False, 1)
    finally:
        cpu._kernel.cache_clear()


def test_threads_change_nothing():
    attended, _ = drawn(SHAPES[0], torch.bfloat16)
    columns = torch.rand(1, 9, 130) < 0.1
    threads = torch.get_num_threads()
    one = scale_weights(attended, columns, 0.4)
    torch.set_num_threads(2)
    try:
        two = scale_weights(attended, columns, 0.4)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


def test_refused():
    attended, _ = drawn(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match=r"columns must be bool \[2, 4, 37\]"):
        scale_weights(attended, torch.zeros(2, 4, 36, dtype=torch.bool), 0.4)
    none = torch.zeros(2, 37, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"asked must be bool \[2, 37\]"):
        move_weights(attended, none, none, none, none[:, 1:], share=0.6, rho=0.5, least=0.2, by_sinks=False)
    with pytest.raises(ValueError, match=r"heads must be in 0..3, got \[4\]"):
        scale_weights(attended, torch.zeros(2, 1, 37, dtype=torch.bool), 0.4, [4])
    columns = torch.zeros(2, 4, 37, dtype=torch.bool)
    for name in ("out", "v", "lse"):
        wrong = dataclasses.replace(attended, **{name: getattr(attended, name).bfloat16()})
        with pytest.raises(TypeError, match=r"one float dtype|must be float32"):
            scale_weights(wrong, columns, 0.4)
    short = Attended(attended.q, attended.k, attended.v, attended.out, attended.lse[:, :1], 0.1)
    with pytest.raises(ValueError, match="do not fit"):
        scale_weights(short, torch.zeros(2, 4, 37, dtype=torch.bool), 0.4)


def test_other_calls_than_compiled_ones_are_computed_in_the_open():
    attended, weights = drawn(SHAPES[1], torch.float32)
    double = Attended(*(x.double() for x in (attended.q, attended.k, attended.v, attended.out)), attended.lse, 0.125)
    assert not can_shift(double.q, double.k, double.v)
    assert not can_shift(attended.q, attended.k.to("meta"), attended.v)
    columns = torch.rand(2, 4, 37, generator=torch.Generator().manual_seed(0)) < 0.3
    found = scale_weights(double, columns, 0.4)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found, scaled(weights, columns, 0.4) @ wide(double.v, 4), rtol=1e-5, atol=1e-5)


def test_memory_that_is_not_there_is_said():
    attended, _ = drawn(SHAPES[1], torch.float32)
    limit = native.library().eff_limit_scratch
    limit(0)
    try:
        with pytest.raises(MemoryError, match="attention_shift"):
            scale_weights(attended, torch.ones(2, 4, 37, dtype=torch.bool), 0.4)
    finally:
        limit(-1)

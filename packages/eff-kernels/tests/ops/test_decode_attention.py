import math
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from eff_kernels import native
from eff_kernels.op import triton_interprets
from eff_kernels.ops.decode_attention import api, cpu, decode_attention, reference, scored_decode_attention
from eff_kernels.ops.decode_attention.specs import SCORED_SPECS, SPECS, paged
from eff_kernels.testing.aot import assert_compiles
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st


def with_table(function, q, k, v, lengths, block_table=None, **options):
    return function(q, k, v, lengths, block_table=block_table, **options)


class TestDecodeAttention(OpTests):
    function = staticmethod(partial(with_table, decode_attention))
    reference = staticmethod(reference.decode_attention)
    op = api.OP
    specs = SPECS
    may_refuse: ClassVar = {"cpu": "contiguous last dimension", "triton": "contiguous last dimension"}

    def schema_args(self, spec, args):
        q, k, v, lengths, *table = args
        scale = spec.kwargs.get("scale") or q.size(2) ** -0.5
        return q, k, v, lengths, (table[0] if table else None), spec.kwargs.get("run", 0), scale


class TestScoredDecodeAttention(OpTests):
    function = staticmethod(partial(with_table, scored_decode_attention))
    reference = staticmethod(reference.scored_decode_attention)
    op = api.SCORED
    specs = SCORED_SPECS
    may_refuse: ClassVar = TestDecodeAttention.may_refuse

    def schema_args(self, spec, args):
        *rest, scale = TestDecodeAttention.schema_args(self, spec, args)
        return (*rest, spec.kwargs["score_block"], scale)


@pytest.fixture(params=["cpu", "reference", *(["triton"] if triton_interprets() else [])])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS[:6], ids=lambda s: s.name)
def test_pages_give_what_a_contiguous_cache_gives(spec, dtype, backend):
    q, k, v, lengths = spec.args(dtype)
    wanted = decode_attention(q, k, v, lengths, backend=backend, **spec.kwargs)
    *pages, table = paged(k, v, 16, torch.Generator().manual_seed(0))
    actual = decode_attention(q, *pages, lengths, block_table=table, backend=backend, **spec.kwargs)
    # The order of the sums is another one: a few roundings of float32, or one of the output's dtype.
    torch.testing.assert_close(actual, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 6),
    keys=st.integers(1, 600),
    d=st.sampled_from([8, 24, 64]),
    seed=st.integers(0, 1000),
)
def test_equals_sdpa(batch, kv, group, keys, d, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv * group, d, generator=generator)
    k, v = (torch.randn(batch, kv, keys, d, generator=generator) for _ in range(2))
    lengths = torch.randint(1, keys + 1, (batch,), generator=generator, dtype=torch.int32)
    mask = torch.arange(keys)[None, None, None] < lengths[:, None, None, None]
    wanted = F.scaled_dot_product_attention(q.double()[:, :, None], k.double(), v.double(), mask, enable_gqa=True)[
        :, :, 0
    ]
    for name in ("cpu", "reference"):
        actual = decode_attention(q, k, v, lengths, backend=name)
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv=st.integers(1, 3),
    group=st.integers(1, 5),
    run=st.integers(1, 80),
    count=st.integers(1, 9),
    score_block=st.integers(1, 130),
    seed=st.integers(0, 1000),
)
def test_runs_are_the_rows_that_they_name(batch, kv, group, run, count, score_block, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = run * count + 5
    q = torch.randn(batch, kv * group, 16, generator=generator)
    k, v = torch.randn(2, batch, kv, rows, 16, generator=generator)
    table = torch.randint(0, rows - run + 1, (batch, kv, count), generator=generator, dtype=torch.int32)
    lengths = torch.randint(0, run * count + 1, (batch,), generator=generator, dtype=torch.int32)
    at = (table[..., None] + torch.arange(run)).flatten(2).long()[..., None].expand(-1, -1, -1, 16)
    chosen = [t.gather(2, at) for t in (k, v)]
    wanted = decode_attention(q, *chosen, lengths, backend="reference")
    for name in ("cpu", "reference"):
        out, mass = scored_decode_attention(
            q, k, v, lengths, block_table=table, run=run, score_block=score_block, backend=name
        )
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
        weights = (q.unflatten(1, (kv, group)) @ chosen[0].mT) * 0.25
        weights = weights.masked_fill(torch.arange(run * count) >= lengths[:, None, None, None], -torch.inf)
        mass_wanted = torch.nn.functional.pad(
            weights.softmax(-1).nan_to_num().sum(2), (0, -(run * count) % score_block)
        )
        torch.testing.assert_close(mass, mass_wanted.unflatten(2, (-1, score_block)).sum(3), rtol=1e-4, atol=1e-5)


def test_scores_of_a_worked_example(backend):
    """Keys 0 and 64 have score log 3, the others 0: blocks of 64 keys weigh 66, 66 and 2 of 134."""
    k = torch.zeros(1, 1, 130, 8)
    k[0, 0, [0, 64], 0] = math.log(3)
    q = torch.zeros(1, 2, 8)
    q[..., 0] = 1
    lengths = torch.tensor([130], dtype=torch.int32)
    out, mass = scored_decode_attention(q, k, k, lengths, score_block=64, scale=1.0, backend=backend)
    torch.testing.assert_close(mass, 2 * torch.tensor([[[66.0, 66.0, 2.0]]]) / 134)
    torch.testing.assert_close(out[0, :, 0], torch.full((2,), 6 * math.log(3) / 134))


def test_each_head_reads_its_own_pages_only(backend):
    q, k = torch.randn(1, 4, 16), torch.randn(6, 2, 32, 16)
    v = torch.randn(6, 2, 32, 16)
    table = torch.tensor([[[0, 2, 4], [1, 5, 3]]], dtype=torch.int32)
    lengths = torch.tensor([80], dtype=torch.int32)
    wanted = decode_attention(q, k, v, lengths, block_table=table, backend=backend)
    for cache in (k, v):
        cache[[1, 3, 5], 0], cache[[0, 2, 4], 1] = torch.nan, torch.nan
        cache[4, 0, 16:], cache[3, 1, 16:] = torch.nan, torch.nan
    assert torch.equal(decode_attention(q, k, v, lengths, block_table=table, backend=backend), wanted)


def test_length_zero_gives_zeros(backend):
    q, k = torch.randn(2, 4, 16), torch.randn(2, 2, 5, 16)
    out = decode_attention(q, k, k, torch.tensor([0, 3], dtype=torch.int32), backend=backend)
    assert not out[0].any()
    assert out[1].any()


def test_keys_beyond_the_length_are_not_read(backend):
    q, k, v = torch.randn(1, 4, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16)
    lengths = torch.tensor([130], dtype=torch.int32)
    wanted = decode_attention(q, k, v, lengths, backend=backend)
    k[:, :, 130:], v[:, :, 130:] = torch.nan, torch.nan
    assert torch.equal(decode_attention(q, k, v, lengths, backend=backend), wanted)


@pytest.mark.parametrize("scores", [1e4, -1e4])
def test_large_scores_do_not_overflow(backend, scores):
    q = torch.full((1, 1, 8), scores)
    k = torch.linspace(-1, 1, 200)[None, None, :, None].expand(1, 1, 200, 8).contiguous()
    v = torch.randn(1, 1, 200, 8)
    out = decode_attention(q, k, v, torch.tensor([200], dtype=torch.int32), backend=backend)
    torch.testing.assert_close(out[0, 0], v[0, 0, -1 if scores > 0 else 0])


def test_nan_in_a_key_reaches_its_output(backend):
    q, k = torch.randn(2, 2, 8), torch.randn(2, 2, 20, 8)
    v = k.clone()
    k[1, 0, 3, 2] = torch.nan
    out = decode_attention(q, k, v, torch.tensor([20, 20], dtype=torch.int32), backend=backend)
    assert out[1, 0].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, 1].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(2, 4, 8)}, ValueError, r"\[2, 4, 8\]"),
        ({"q": torch.ones(2, 3, 16)}, ValueError, "3"),
        ({"lengths": torch.tensor([1, 2])}, TypeError, "int64"),
        ({"lengths": torch.tensor([1, 6], dtype=torch.int32)}, ValueError, "6 for sequence 1"),
        ({"lengths": torch.tensor([-1, 5], dtype=torch.int32)}, ValueError, "-1 for sequence 0"),
        ({"lengths": torch.tensor([1], dtype=torch.int32)}, ValueError, r"\[1\]"),
        (
            {"block_table": torch.tensor([[0], [2]], dtype=torch.int32)},
            ValueError,
            "sequence 1 names pages outside 0..1",
        ),
        ({"v": torch.ones(2, 2, 5, 16).half()}, TypeError, "float16"),
        ({"run": 2}, ValueError, "needs a block_table"),
        (
            {"run": 4, "block_table": torch.tensor([[0, 0], [1, 5]], dtype=torch.int32)},
            ValueError,
            "sequence 1 has runs",
        ),
        ({"block_table": torch.zeros(2, 3, 1, dtype=torch.int32)}, ValueError, r"\[2, 2, max_pages\], got \[2, 3, 1\]"),
    ],
)
def test_errors_name_what_they_saw(change, error, message):
    cache = torch.ones(2, 2, 5, 16)
    call = {
        "q": torch.ones(2, 4, 16),
        "k": cache,
        "v": cache,
        "lengths": torch.tensor([1, 5], dtype=torch.int32),
        **change,
    }
    with pytest.raises(error, match=message):
        decode_attention(**call)


def test_a_sequence_does_not_depend_on_the_rest_of_its_batch(backend):
    q = torch.randn(3, 4, 16)
    k, v = torch.randn(2, 3, 2, 600, 16)
    lengths = torch.tensor([600, 31, 257], dtype=torch.int32)
    together = decode_attention(q, k, v, lengths, backend=backend)
    alone = [
        decode_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], lengths[b : b + 1], backend=backend)
        for b in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_triton_kernels_compile_for_each_gpu():
    assert_compiles("eff_kernels.ops.decode_attention.triton")


def odd_sizes(dtype):
    """Head dimensions with and without a rest, groups of one to five heads, lengths around the sizes of blocks."""
    generator = torch.Generator().manual_seed(0)
    for d, group, keys in ((8, 1, 70), (32, 2, 15), (40, 3, 17), (64, 4, 257), (72, 5, 64), (104, 1, 3), (128, 3, 300)):
        q = torch.randn(2, 2 * group, d, generator=generator)
        k, v = (torch.randn(2, 2, keys, d, generator=generator).to(dtype) for _ in range(2))
        yield q, k, v, torch.tensor([keys, keys // 2], dtype=torch.int32)


def assert_exact(dtype):
    for q, k, v, lengths in odd_sizes(dtype):
        scale = q.size(2) ** -0.5
        wanted = reference.decode_attention(q.double(), k.double(), v.double(), lengths, None, 0, scale)
        k, v = k.clone(), v.clone()
        k[1, :, lengths[1] :], v[1, :, lengths[1] :] = float("nan"), float("nan")  # never read
        got = cpu.decode_attention(q, k, v, lengths, None, 0, scale)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=2e-6)  # float32 sums of at most 300 terms
        out, mass = cpu.scored_decode_attention(q, k, v, lengths, None, 0, 16, scale)
        torch.testing.assert_close(out, got, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(mass.sum(-1), torch.full(mass.shape[:2], q.size(1) / 2.0), rtol=1e-5, atol=0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.skipif(bool(native.unavailable()), reason=str(native.unavailable()))
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_of_half_precision_costs_no_precision(dtype):
    assert_exact(dtype)


@pytest.mark.skipif(bool(native.unavailable()), reason=str(native.unavailable()))
@pytest.mark.parametrize("define", ["EFF_GENERIC", "EFF_NO_AVX512"])
def test_code_for_other_processors(define, monkeypatch):
    monkeypatch.setattr(cpu.native, "library", lambda build=native.library: build(define))
    cpu._kernel.cache_clear()
    try:
        for dtype in DTYPES:
            assert_exact(dtype)
    finally:
        cpu._kernel.cache_clear()

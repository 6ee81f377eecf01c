"""The linear branch alone: the compiled one of the CPU, and the matrix products of GPUs and of the gradients."""

import itertools

import pytest
import torch
from eff_kernels import BlockMap, native
from eff_kernels.ops.sparse_linear_attention import common, cpu, linear, reference
from hypothesis import given, settings
from hypothesis import strategies as st

FORWARDS = [pytest.param(cpu._linear, id="compiled"), pytest.param(linear.forward, id="products")]


@pytest.fixture(params=FORWARDS)
def forward(request):
    if request.param is cpu._linear and native.unavailable():
        pytest.skip(native.unavailable())
    return request.param


def tensors(*sizes, batch=1, dtype=torch.float32, seed=0):
    """Random q, k, v from (heads, length, features) of each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *size, generator=generator).to(dtype) for size in sizes]


def random_map(q, k, block_q, block_k, seed=0):
    shape = (*q.shape[:2], -(-q.size(2) // block_q), -(-k.size(2) // block_k))
    mask = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return BlockMap(mask, block_q, block_k)


def exact(q, k, v, blocks, feature_map, scope):
    args = [t.double() for t in (q, k, v)]
    return reference.sparse_linear_attention(*args, *blocks, feature_map, scope, 1.0)[1]


def assert_near(found, q, k, v, blocks, feature_map, scope):
    wanted = exact(q, k, v, blocks, feature_map, scope)
    roundings = 4 * torch.finfo(q.dtype).eps if q.dtype != torch.float32 else 1e-5
    torch.testing.assert_close(found.double(), wanted, rtol=roundings, atol=roundings * float(v.abs().max()))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 70)] * 2),
    st.tuples(*[st.integers(1, 40)] * 2),
    st.tuples(*[st.integers(1, 40)] * 2),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.sampled_from(["softmax", "elu"]),  # of relu the weight may be one tiny product, without any bound on the error
    st.sampled_from(common.LINEAR_SCOPES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 999),
)
@pytest.mark.parametrize("run", FORWARDS)
def test_any_shape(run, lengths, blocks, features, heads, feature_map, scope, dtype, seed):
    if run is cpu._linear and native.unavailable():
        pytest.skip(native.unavailable())
    (n, m), (d, dv) = lengths, features
    q, k, v = tensors((heads[0], n, d), (heads[1], m, d), (heads[1], m, dv), dtype=dtype, seed=seed)
    call = q, k, v, random_map(q, k, *blocks, seed), feature_map, scope
    assert_near(run(*call[:3], *call[3], *call[4:]), *call)


def test_relu(forward):
    q, k, v = tensors((4, 70, 24), (2, 50, 24), (2, 50, 24))
    for scope in common.LINEAR_SCOPES:
        call = q, k, v, random_map(q, k, 16, 8), "relu", scope
        assert_near(forward(*call[:3], *call[3], *call[4:]), *call)


def test_weights_of_zero_give_zero(forward):
    q, k, v = tensors((1, 8, 4), (1, 8, 4), (1, 8, 4))
    blocks = BlockMap(torch.zeros(1, 1, 2, 2, dtype=torch.int8), 4, 4)
    assert torch.equal(forward(-q.abs(), k, v, *blocks, "relu", "marginal"), torch.zeros_like(v))


@pytest.mark.parametrize("feature_map", common.FEATURE_MAPS)
def test_extreme_inputs_stay_finite(feature_map, forward):
    q, k, v = (300 * t for t in tensors((1, 32, 16), (1, 32, 16), (1, 32, 16)))
    blocks = BlockMap(torch.zeros(1, 1, 2, 2, dtype=torch.int8), 16, 16)
    found = forward(q, k, v, *blocks, feature_map, "marginal")
    torch.testing.assert_close(found.double(), exact(q, k, v, blocks, feature_map, "marginal"), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("feature_map", common.FEATURE_MAPS)
def test_nan_is_not_lost(feature_map, forward):
    q, k, v = tensors((1, 32, 16), (1, 32, 16), (1, 32, 16))
    blocks = BlockMap(torch.tensor([[[[0, -1], [-1, 0]]]], dtype=torch.int8), 16, 16)
    clean = forward(q, k, v, *blocks, feature_map, "marginal")
    for tensor, row, seen in ((q, 3, [3]), (k, 3, range(16)), (v, 3, range(16))):
        saved = tensor[0, 0, row].clone()
        tensor[0, 0, row] = torch.nan
        found = forward(q, k, v, *blocks, feature_map, "marginal")[0, 0]
        rows = found.isnan().any(-1).nonzero().flatten().tolist()
        assert rows == list(seen)
        kept = [i for i in range(32) if i not in seen]
        assert torch.equal(found[kept], clean[0, 0, kept])
        tensor[0, 0, row] = saved


def test_more_heads_than_memory_is_given_for_their_states(forward):
    q, k, v = tensors((10, 70, 64), (5, 4096, 64), (5, 4096, 64))
    call = q, k, v, random_map(q, k, 64, 4), "softmax", "marginal"
    assert_near(forward(*call[:3], *call[3], *call[4:]), *call)


def test_any_layout_of_the_tensors(forward):
    q, k, v = tensors((2, 40, 16), (2, 40, 16), (2, 40, 16))
    blocks = random_map(q, k, 8, 8)
    wanted = forward(q, k, v, *blocks, "softmax", "marginal")
    for change in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], -1)[..., :16],
    ):
        assert torch.equal(forward(*map(change, (q, k, v)), *blocks, "softmax", "marginal"), wanted)


def test_bits_do_not_depend_on_the_number_of_threads():
    if native.unavailable():
        pytest.skip(native.unavailable())
    q, k, v = tensors((4, 200, 32), (2, 200, 32), (2, 200, 32), batch=2)
    blocks, before = random_map(q, k, 16, 16), torch.get_num_threads()
    for scope in common.LINEAR_SCOPES:
        one = cpu._linear(q, k, v, *blocks, "softmax", scope)
        torch.set_num_threads(3)
        assert torch.equal(cpu._linear(q, k, v, *blocks, "softmax", scope), one)
        torch.set_num_threads(before)


@pytest.mark.parametrize("define", ["EFF_GENERIC", "EFF_NO_AVX512"])
def test_code_for_other_processors(define, monkeypatch):
    if native.unavailable():
        pytest.skip(native.unavailable())
    q, k, v = tensors((4, 50, 20), (2, 45, 20), (2, 45, 11))
    monkeypatch.setattr(cpu.native, "library", lambda build=native.library: build(define))
    cpu._kernel.cache_clear()
    try:
        for feature_map, scope in itertools.product(common.FEATURE_MAPS, common.LINEAR_SCOPES):
            call = q, k, v, random_map(q, k, 16, 8), feature_map, scope
            assert_near(cpu._linear(*call[:3], *call[3], *call[4:]), *call)
    finally:
        cpu._kernel.cache_clear()

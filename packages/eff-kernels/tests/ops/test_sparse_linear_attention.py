import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from eff_kernels import BlockMap, block_map, sparse_linear_attention
from eff_kernels.ops.sparse_linear_attention import api, autograd, linear, reference
from eff_kernels.ops.sparse_linear_attention.specs import SPECS
from eff_kernels.testing.op_tests import OpTests
from hypothesis import given, settings
from hypothesis import strategies as st

SCOPES = ("marginal", "noncritical", "all")
MAPS = ("softmax", "elu", "relu")
BACKENDS = [b.name for b in api.OP.backends if b.name != "triton"]


def complete(q, k, v, blocks, feature_map="softmax", linear_scope="marginal", scale=None):
    """The arguments of the op's schema."""
    return q, k, v, *blocks, feature_map, linear_scope, q.size(-1) ** -0.5 if scale is None else scale


class TestSparseLinearAttention(OpTests):
    function = staticmethod(sparse_linear_attention)
    reference = staticmethod(reference.sparse_linear_attention)
    op = api.OP
    specs = SPECS
    differentiable = ("q", "k", "v")
    factor = 3.0  # weights computed again from a rounded lse, in powers of two, and two branches to add
    may_refuse: ClassVar = {"triton": "takes blocks of 16, 32, 64 or 128"}

    def schema_args(self, spec, args):
        return complete(*args, **spec.kwargs)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def tensors(*sizes, batch=1, dtype=torch.float64, seed=0):
    """Random q, k, v from (heads, length, features) of each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *size, generator=generator, dtype=dtype) for size in sizes]


def expand(mask, block_q, block_k, length, keys):
    """The map for each pair of tokens, [B, H, L, Lk]."""
    return mask.repeat_interleave(block_q, 2)[:, :, :length].repeat_interleave(block_k, 3)[..., :keys]


def feature(x, name):
    return {"softmax": x.softmax(-1), "elu": torch.where(x > 0, x + 1, x.exp()), "relu": x.clamp(min=0)}[name]


def by_tokens(q, k, v, blocks, feature_map, linear_scope, scale):
    """Both branches from dense weights and the expanded map, in float64 and without the reference's code."""
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.size(1) // k.size(1), 1) for t in (k, v))
    classes = expand(*blocks, q.size(2), k.size(2))
    scores = (scale * q @ k.mT).masked_fill(classes != 1, -torch.inf)
    lse = scores.logsumexp(-1)
    sparse = (scores - lse[..., None]).exp().nan_to_num(0) @ v
    scope = {"marginal": classes == 0, "noncritical": classes != 1, "all": classes > -2}[linear_scope]
    weights = feature(q, feature_map) @ feature(k, feature_map).mT * scope
    return sparse, (weights / weights.sum(-1, keepdim=True)).nan_to_num(0) @ v, lse


@st.composite
def calls(draw):
    block_q, block_k = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    length, keys = draw(st.integers(1, 45)), draw(st.integers(1, 45))
    groups, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    d, dv = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    sizes = (groups * group, length, d), (groups, keys, d), (groups, keys, dv)
    shares = draw(st.sampled_from([(0.05, 0.1), (0.5, 0.3), (0.0, 1.0), (1.0, 0.0), (0.2, 0.2)]))
    return (
        sizes,
        (block_q, block_k),
        shares,
        draw(st.sampled_from(MAPS)),
        draw(st.sampled_from(SCOPES)),
        draw(st.integers(0, 999)),
    )


def random_call(call, dtype=torch.float64):
    sizes, (block_q, block_k), (high, low), feature_map, scope, seed = call
    q, k, v = tensors(*sizes, dtype=dtype, seed=seed)
    blocks = block_map(q, k, k_high=high, k_low=low, block_q=block_q, block_k=block_k)
    return complete(q, k, v, blocks, feature_map, scope)


@settings(max_examples=100, deadline=None)
@given(calls())
def test_reference_is_the_formula_over_tokens(call):
    args = random_call(call)
    wanted = by_tokens(*args[:3], BlockMap(*args[3:6]), *args[6:])
    torch.testing.assert_close(reference.sparse_linear_attention(*args), wanted, rtol=1e-12, atol=1e-13)


@settings(max_examples=50, deadline=None)
@given(calls())
def test_reference_backward_is_the_derivative(call):
    args = random_call(call)
    leaves, generator = [a.clone().requires_grad_() for a in args[:3]], torch.Generator().manual_seed(call[-1])
    outputs = reference.sparse_linear_attention(*leaves, *args[3:])
    grads = [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
    wanted = torch.autograd.grad(outputs, leaves, grads)
    back = (*grads, *args[:4], *(o.detach() for o in outputs), *args[4:])
    torch.testing.assert_close(reference.sparse_linear_attention_backward(*back), wanted, rtol=1e-10, atol=1e-11)


def assert_near(actual, function, args):
    """Up to some roundings, and sixteen times what the reference loses in float32: weights may nearly vanish."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    for found, exact, plain in zip(actual, function(*wide), function(*args), strict=True):
        lost = (plain - exact).abs().amax() if exact.numel() else 0.0
        assert bool(((found - exact).abs() <= 2e-5 * (1 + exact.abs()) + 16 * lost).all())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(calls())
def test_fast_code_on_any_call(call):
    args, generator = random_call(call, torch.float32), torch.Generator().manual_seed(call[-1])
    assert_near(outputs := api.OP(*args), reference.sparse_linear_attention, args)
    back = (*(torch.randn(o.shape, generator=generator) for o in outputs), *args[:4], *outputs, *args[4:])
    assert_near(autograd.BACKWARD_OP(*back), reference.sparse_linear_attention_backward, back)


@settings(max_examples=100, deadline=None)
@given(calls())
def test_map_has_the_classes_that_were_asked_for(call):
    sizes, (block_q, block_k), (high, low), *_, seed = call
    q, k, _ = tensors(*sizes, seed=seed)
    mask = block_map(q, k, k_high=high, k_low=low, block_q=block_q, block_k=block_k).mask
    tn = math.ceil(k.size(2) / block_k)
    assert mask.shape == (1, q.size(1), math.ceil(q.size(2) / block_q), tn)
    critical = max(1, round(high * tn))
    negligible = min(round(low * tn), tn - critical)
    assert ((mask == 1).sum(-1) == critical).all()
    assert ((mask == -1).sum(-1) == negligible).all()
    assert ((mask == 0).sum(-1) == tn - critical - negligible).all()


def test_map_by_hand():
    q = torch.tensor([1.0, 1, -1, 3, -5])[None, None, :, None]  # means 1, 1 and -5
    k = torch.tensor([4.0, 0, 1, 1, 9, 9, 3])[None, None, :, None]  # means 2, 1, 9 and 3
    mask = block_map(q, k, k_high=0.25, k_low=0.25, block_q=2, block_k=2).mask
    assert mask[0, 0].tolist() == [[0, -1, 1, 0], [0, -1, 1, 0], [0, 1, -1, 0]]


def test_equal_scores_rank_by_place():
    q, k = torch.ones(1, 1, 8, 4), torch.ones(1, 1, 80, 4)
    for smooth in (True, False):
        mask = block_map(q, k, k_high=0.3, k_low=0.2, block_q=8, block_k=8, smooth_k=smooth).mask
        assert mask[0, 0, 0].tolist() == [1, 1, 1, 0, 0, 0, 0, 0, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_on_all_keys_does_not_change_the_map(dtype):
    q, k, _ = tensors((2, 60, 8), (2, 60, 8), (2, 60, 8), dtype=dtype)
    options = {"k_high": 0.3, "k_low": 0.3, "block_q": 8, "block_k": 8}
    mask = block_map(q, k, **options).mask
    assert torch.equal(block_map(q, k + torch.randn(8, dtype=dtype), **options).mask, mask)


def test_smoothing_is_that_of_the_keys_before_they_are_pooled():
    q, k, _ = tensors((2, 30, 8), (1, 43, 8), (1, 43, 8))
    options = {"k_high": 0.3, "k_low": 0.3, "block_q": 8, "block_k": 8}
    smoothed = block_map(q, k - k.mean(2, keepdim=True), smooth_k=False, **options)
    assert torch.equal(block_map(q, k, **options).mask, smoothed.mask)


@pytest.mark.parametrize("span", [(0, 5), (13, 14), (20, 43), (0, 43)])
def test_protected_keys_are_critical_everywhere(span):
    q, k, _ = tensors((4, 50, 8), (2, 43, 8), (2, 43, 8))
    mask = block_map(q, k, k_high=0.4, k_low=0.3, block_q=8, block_k=8, protect=span).mask
    first, stop = span[0] // 8, (span[1] + 7) // 8
    assert (mask[..., first:stop] == 1).all()
    assert ((mask == 1).sum(-1) == max(2, stop - first)).all()


def test_map_takes_no_gradient_and_any_layout():
    q, k, _ = tensors((4, 50, 8), (2, 43, 8), (2, 43, 8))
    options = {"k_high": 0.3, "k_low": 0.3, "block_q": 8, "block_k": 8}
    views = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in (q, k)]
    mask = block_map(*views, **options).mask
    assert not mask.requires_grad
    assert torch.equal(mask, block_map(q, k, **options).mask)
    compiled = torch.compile(block_map, fullgraph=True, backend="aot_eager")(q, k, **options)
    assert torch.equal(compiled.mask, mask)


@pytest.mark.parametrize(("length", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_map_of_nothing(length, keys):
    mask = block_map(torch.zeros(2, 4, length, 8), torch.zeros(2, 2, keys, 8), block_q=4, block_k=4).mask
    assert mask.shape == (2, 4, math.ceil(length / 4), math.ceil(keys / 4))


def test_all_blocks_critical_is_plain_attention(backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    q, k, v = tensors((2, 50, 16), (2, 70, 16), (2, 70, 16), dtype=dtype)
    out = sparse_linear_attention(q, k, v, block_map(q, k, k_high=1, k_low=0), backend=backend)
    tolerance = 4e-15 if backend == "reference" else 1e-6
    torch.testing.assert_close(out.sparse, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=tolerance)
    assert not out.linear.any()


def test_sparse_branch_is_attention_with_the_expanded_mask(backend):
    q, k, v = tensors((4, 50, 16), (2, 70, 16), (2, 70, 16), dtype=torch.float32)
    blocks = block_map(q, k, k_high=0.3, block_q=16, block_k=8)
    mask = expand(*blocks, 50, 70) == 1
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(
        sparse_linear_attention(q, k, v, blocks, backend=backend).sparse, wanted, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("feature_map", MAPS)
def test_linear_branch_is_the_formula_over_tokens(scope, feature_map, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32
    args = complete(*tensors((4, 50, 16), (2, 70, 16), (2, 70, 16), dtype=dtype), BlockMap(MASK, 16, 8))
    args = (*args[:6], feature_map, scope, args[-1])
    wanted = by_tokens(*args[:3], BlockMap(*args[3:6]), *args[6:])[1]
    tolerance = 1e-14 if backend == "reference" else 2e-6
    actual = api.OP(*args, backend=backend)[1]
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=tolerance)


MASK = torch.randint(-1, 2, (1, 4, 4, 9), generator=torch.Generator().manual_seed(0)).to(torch.int8)


@pytest.mark.parametrize("feature_map", MAPS)
def test_all_keys_less_the_critical_ones_are_the_noncritical(feature_map):
    """The subtraction of the paper's fused kernel gives what the direct sums give."""
    q, k, v = tensors((4, 50, 16), (4, 70, 16), (4, 70, 16))
    phi_q, phi_k = feature(q, feature_map), feature(k, feature_map)
    critical = (expand(MASK, 16, 8, 50, 70) == 1).double()
    ones = F.pad(v, (0, 1), value=1.0)
    total = phi_q @ (phi_k.mT @ ones) - ((phi_q @ phi_k.mT) * critical) @ ones
    out = sparse_linear_attention(
        q, k, v, BlockMap(MASK, 16, 8), feature_map=feature_map, linear_scope="noncritical", backend="reference"
    )
    torch.testing.assert_close(out.linear, total[..., :-1] / total[..., -1:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(scope, feature_map):
    q, k, v = (t.requires_grad_() for t in tensors((1, 24, 8), (1, 24, 8), (1, 24, 8)))
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    blocks = block_map(q, k, k_high=0.3, k_low=0.3, block_q=4, block_k=4)

    def run(q, k, v, weight):
        out = sparse_linear_attention(q, k, v, blocks, feature_map=feature_map, linear_scope=scope)
        return out.sparse + out.linear @ weight.mT, out.lse

    assert torch.autograd.gradcheck(run, (q, k, v, weight))


def test_negligible_pairs_get_no_gradient(backend):
    q, k, v = (t.requires_grad_() for t in tensors((1, 24, 8), (1, 24, 8), (1, 24, 8), dtype=torch.float32))
    blocks = block_map(q, k, k_high=0.3, k_low=0.5, block_q=4, block_k=4)
    for i in range(6):
        out = sparse_linear_attention(q, k, v, blocks, backend=backend)
        rows = slice(4 * i, 4 * i + 4)
        loss = sum(o[:, :, rows].square().sum() for o in out)
        _, dk, dv = torch.autograd.grad(loss, (q, k, v))
        unseen = expand(*blocks, 24, 24)[0, 0, 4 * i] == -1
        assert unseen.any()
        for grad in (dk, dv):
            assert torch.equal(grad[0, 0].abs().sum(-1) == 0, unseen)


def test_whole_key_blocks_may_change_places(backend):
    q, k, v = tensors((2, 50, 16), (2, 64, 16), (2, 64, 16), dtype=torch.float32)
    blocks = block_map(q, k, k_high=0.3, block_q=16, block_k=8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    k2, v2 = (t.unflatten(2, (8, 8))[:, :, order].flatten(2, 3) for t in (k, v))
    moved = sparse_linear_attention(q, k2, v2, blocks._replace(mask=blocks.mask[..., order]), backend=backend)
    wanted = sparse_linear_attention(q, k, v, blocks, backend=backend)
    torch.testing.assert_close(moved, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(block_map(q, k2, k_high=0.3, block_q=16, block_k=8).mask, blocks.mask[..., order])


def test_nan_stays_with_the_query_blocks_that_see_it(backend):
    q, k, v = tensors((1, 64, 16), (1, 64, 16), (1, 64, 16), dtype=torch.float32)
    blocks = block_map(q, k, k_high=0.2, k_low=0.4, block_q=16, block_k=8, smooth_k=False)
    for tensor in (k, v):
        for j in range(8):
            saved = tensor[0, 0, 8 * j].clone()
            tensor[0, 0, 8 * j] = math.nan
            out = sparse_linear_attention(q, k, v, blocks, backend=backend)
            classes = blocks.mask[0, 0, :, j].repeat_interleave(16)
            assert torch.equal(out.sparse.isnan().any(-1)[0, 0], classes == 1)
            assert torch.equal(out.linear.isnan().any(-1)[0, 0], classes == 0)
            tensor[0, 0, 8 * j] = saved


def test_threads_and_batch_do_not_change_the_result(monkeypatch):
    q, k, v = (
        t.requires_grad_() for t in tensors((4, 200, 16), (2, 200, 16), (2, 200, 16), batch=2, dtype=torch.float32)
    )
    blocks = block_map(q, k, k_high=0.3, block_q=16, block_k=16)

    def run():
        out = sparse_linear_attention(q, k, v, blocks)
        return *out, *torch.autograd.grad([o.square().sum() for o in out], (q, k, v))

    one = run()
    torch.set_num_threads(2)
    try:
        two = run()
    finally:
        torch.set_num_threads(1)
    assert torch.equal(two[0], one[0])
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
    alone = sparse_linear_attention(q[1:], k[1:], v[1:], blocks._replace(mask=blocks.mask[1:]))
    assert torch.equal(alone.sparse, one[0][1:])
    # As many heads at a time as fit, or one alone.
    monkeypatch.setattr(linear, "_STATES", 1)
    torch.testing.assert_close(run(), one, rtol=1e-5, atol=1e-5)


def test_query_blocks_without_keys_are_zero(backend):
    q, k, v = tensors((1, 20, 8), (1, 20, 8), (1, 20, 8), dtype=torch.float32)
    blocks = BlockMap(torch.tensor([[[[-1, -1], [1, 0], [-1, 1], [0, -1]]]], dtype=torch.int8), 5, 10)
    out = sparse_linear_attention(q, k, v, blocks, backend=backend)
    assert not out.sparse[:, :, :5].any()
    assert not out.sparse[:, :, 15:].any()
    assert (out.lse == -torch.inf).flatten().tolist() == [*[True] * 5, *[False] * 10, *[True] * 5]
    assert [bool(out.linear[:, :, i : i + 5].any()) for i in (0, 5, 10, 15)] == [False, True, False, True]


def test_results_over_parts_of_the_keys_can_be_joined(backend):
    q, k, v = tensors((2, 40, 16), (2, 64, 16), (2, 64, 16), dtype=torch.bfloat16)
    near = BlockMap(torch.tensor([1, -1, 1, -1, -1, -1, 1, -1]).to(torch.int8).expand(1, 2, 3, 8), 16, 8)
    a = sparse_linear_attention(q, k, v, near, backend=backend)
    b = sparse_linear_attention(q, k, v, near._replace(mask=-near.mask), backend=backend)
    share = torch.sigmoid(a.lse - b.lse)[..., None]
    joined = share * a.sparse + (1 - share) * b.sparse
    wide = [t.double() for t in (q, k, v)]
    wanted = F.scaled_dot_product_attention(*wide)
    assert (joined - wanted).norm() < 5e-3 * wanted.norm()
    scores = (wide[0] @ wide[1].mT / 4).logsumexp(-1)
    torch.testing.assert_close(torch.logaddexp(a.lse, b.lse).double(), scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_float64(dtype, backend):
    q, k, v = tensors((2, 200, 64), (2, 200, 64), (2, 200, 64), dtype=dtype)
    blocks = block_map(q, k, k_high=0.3, block_q=32, block_k=32)
    actual = sparse_linear_attention(q, k, v, blocks, backend=backend)
    wanted = sparse_linear_attention(*(t.double() for t in (q, k, v)), blocks, backend="reference")
    for a, w in zip(actual, wanted, strict=True):
        assert (a.double() - w).norm() < 1e-2 * w.norm()


Q = torch.zeros(2, 4, 10, 8)
MAP = BlockMap(torch.zeros(2, 4, 3, 3, dtype=torch.int8), 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": Q[:, :3], "v": Q[:, :3]}, ValueError, "query heads, 4, must be a multiple of the key heads, 3"),
        ({"k": Q[..., :7]}, ValueError, r"do not fit: got \[2, 4, 10, 8\] and \[2, 4, 10, 7\]"),
        ({"v": Q[:, :, :9]}, ValueError, r"\[2, 4, 10, 8\], \[2, 4, 9, 8\]"),
        ({"q": Q[0]}, ValueError, r"\[4, 10, 8\]"),
        ({"k": Q.half()}, TypeError, "torch.float32 and torch.float16"),
        ({"v": Q.half()}, TypeError, "got torch.float16"),
        ({"v": Q.to_sparse()}, TypeError, "sparse"),
        ({"block_map": MAP._replace(block_k=5)}, ValueError, r"must be \[2, 4, 3, 2\] .*, got \[2, 4, 3, 3\]"),
        ({"block_map": MAP._replace(block_q=0)}, ValueError, "at least 1, got 0 and 4"),
        ({"block_map": MAP._replace(mask=MAP.mask.long())}, TypeError, "torch.int8 on cpu, got torch.int64"),
        ({"feature_map": "tanh"}, ValueError, r"'tanh'; use one of \('softmax', 'elu', 'relu'\)"),
        ({"linear_scope": "most"}, ValueError, "'most'; use one of .*'noncritical'"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        sparse_linear_attention(**{"q": Q, "k": Q, "v": Q, "block_map": MAP, **change})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_high": 0.8, "k_low": 0.3}, "sum is at most 1, got 0.8 and 0.3"),
        ({"k_high": -0.1}, "got -0.1"),
        ({"block_q": 0}, "block_q must be at least 1, got 0"),
        ({"protect": (3, 11)}, r"range of the 10 keys, got \(3, 11\)"),
        ({"protect": (5, 3)}, r"got \(5, 3\)"),
    ],
)
def test_map_errors_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        block_map(Q, Q, **options)

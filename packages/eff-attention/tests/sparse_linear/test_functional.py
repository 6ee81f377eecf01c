import math

import pytest
import torch
import torch.nn.functional as F
from eff_attention.sparse_linear import (
    BlockMap,
    SLAConfig,
    SparseLinearAttention,
    block_map,
    feature_map,
    sparse_linear_attention,
    tile_order,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def by_hand(q, k, v, chosen, kind="softmax", scope="marginal"):
    """Both branches token by token, in float64."""
    mask, bq, bk = chosen
    every = mask.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[..., : q.size(2), : k.size(2)]
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1).double() for t in (k, v))
    q = q.double()
    scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(every <= 0, -torch.inf)
    phi_q, phi_k = feature_map(q, kind), feature_map(k, kind)
    seen = {"marginal": every == 0, "noncritical": every <= 0, "all": every > -2}[scope]
    weights = (phi_q @ phi_k.mT) * seen
    total = weights.sum(-1, keepdim=True)
    linear = weights @ v / (total + 1e-5) if scope == "all" else torch.nan_to_num(weights @ v / total, nan=0.0)
    return scores.softmax(-1) @ v, linear


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 50),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from(["softmax", "elu", "relu"]),
    st.sampled_from(["marginal", "noncritical", "all"]),
    st.floats(0.0, 0.6),
    st.floats(0.0, 0.4),
)
def test_both_branches_are_those_of_the_tokens(length, blocks, heads, kind, scope, high, low):
    q, k, v = draw(2, heads[0], length, 8), draw(2, heads[1], length, 8, seed=1), draw(2, heads[1], length, 6, seed=2)
    chosen = block_map(q, k, k_high=high, k_low=low, block_q=blocks[0], block_k=blocks[1])
    sparse, linear, _ = sparse_linear_attention(q, k, v, chosen, feature_map=kind, linear_scope=scope)
    wanted = by_hand(q, k, v, chosen, kind, scope)
    torch.testing.assert_close(sparse, wanted[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(linear, wanted[1], rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 30), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_each_row_has_the_configured_counts(length, block, high, low):
    if high + low > 1:
        high, low = 1 - high, 1 - low
    mask = block_map(draw(1, 2, 7, 4), draw(1, 2, length, 4), k_high=high, k_low=low, block_q=3, block_k=block).mask
    n = -(-length // block)
    critical = min(n, max(1, round(high * n)))
    assert ((mask == 1).sum(-1) == critical).all()
    assert ((mask == -1).sum(-1) == min(n - critical, round(low * n))).all()


def test_of_equal_blocks_the_earlier_one_is_critical():
    x = torch.ones(1, 1, 64, 4)
    mask = block_map(x, x, k_high=0.25, k_low=0.25, block_q=16, block_k=16).mask
    assert mask[0, 0].tolist() == [[1, 0, 0, -1]] * 4


def test_a_constant_added_to_all_keys_changes_nothing():
    q, k = draw(1, 2, 96, 8), draw(1, 2, 96, 8, seed=1)
    settings = {"k_high": 0.3, "k_low": 0.3, "block_q": 8, "block_k": 8}
    assert torch.equal(block_map(q, k, **settings).mask, block_map(q, k + 3.0, **settings).mask)


def test_protected_keys_are_always_critical():
    q, k = draw(1, 2, 96, 8), draw(1, 2, 96, 8, seed=1)
    mask = block_map(q, k, k_high=0.1, k_low=0.5, block_q=8, block_k=8, protect=(6, 17)).mask
    assert (mask[..., :3] == 1).all()
    assert (mask[..., 3:] != 1).any()


def test_one_critical_share_is_dense_attention_whatever_the_projection():
    q, k, v = draw(3, 1, 2, 50, 8).unbind()
    attention = SparseLinearAttention(8, SLAConfig(k_high=1.0, k_low=0.0, block_q=16, block_k=16)).double()
    torch.nn.init.normal_(attention.proj.weight)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


def test_what_is_negligible_has_no_gradient_and_may_be_nan():
    q, k, v = (x.clone().requires_grad_() for x in draw(3, 1, 1, 48, 8).unbind())
    chosen = BlockMap(torch.tensor([[[[1, 0, -1]] * 3]], dtype=torch.int8), 16, 16)
    sparse, linear, _ = sparse_linear_attention(q, k, v, chosen)
    (sparse + linear).square().sum().backward()
    for x in (k, v):
        assert x.grad[:, :, :32].any()
        assert not x.grad[:, :, 32:].any()


def test_gradients_are_derivatives():
    q, k, v = (x.clone().requires_grad_() for x in draw(3, 1, 2, 24, 8).unbind())
    weight, bias = (draw(8, 8, seed=5) * 0.1).requires_grad_(), draw(8, seed=6).requires_grad_()
    chosen = block_map(q, k, k_high=0.3, k_low=0.3, block_q=4, block_k=4)
    for kind, scope in (("softmax", "marginal"), ("elu", "noncritical"), ("softmax", "all")):

        def run(q, k, v, weight, bias, kind=kind, scope=scope):
            return sparse_linear_attention(q, k, v, chosen, feature_map=kind, linear_scope=scope).combine(weight, bias)

        assert torch.autograd.gradcheck(run, (q, k, v, weight, bias), fast_mode=True)


def test_bfloat16_is_near_float64():
    q, k, v = draw(3, 1, 4, 300, 64).unbind()
    chosen = block_map(q, k, k_high=0.2, block_q=32, block_k=32)
    narrow = sparse_linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), chosen)
    for found, wanted in zip(narrow[:2], by_hand(q, k, v, chosen), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


def test_arithmetic_falls_with_the_sparsity():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = draw(3, 1, 1, 1024, 64, dtype=torch.float32).unbind()
    chosen = block_map(q, k, k_high=0.05, k_low=0.0)
    critical = int((chosen.mask > 0).sum()) * 64 * 64
    with FlopCounterMode(display=False) as counter:
        sparse_linear_attention(q, k, v, chosen)
    dense = 4 * 1024 * 1024 * 64
    assert critical * 4 * 64 == pytest.approx(0.05 * dense, rel=0.4)  # whole blocks: 1 of 16
    # Products of the linear branch: states, their sums over blocks, and the queries.
    assert counter.get_total_flops() <= 2 * 64 * 65 * (1024 + 16 * 16 + 1024)


def test_tiles_bring_neighbours_together():
    order, inverse = tile_order((4, 6), (2, 3), prefix=1)
    assert order.tolist()[:8] == [0, 1, 2, 3, 7, 8, 9, 4]
    assert torch.equal(order[inverse], torch.arange(25))
    assert sorted(tile_order((3, 5, 7), (2, 2, 2))[0].tolist()) == list(range(105))
    with pytest.raises(ValueError, match="same axes"):
        tile_order((4, 6), (2,))


def test_settings_travel_and_bad_ones_are_named():
    config = SLAConfig(k_high=0.2, protect=(0, 5), feature_map="elu")
    assert SLAConfig.from_dict(config.to_dict()) == config
    for changes, text in (
        ({"k_high": 0.8, "k_low": 0.3}, "at most 1 together"),
        ({"k_high": -0.1}, r"lie in \[0, 1\]"),
        ({"block_q": 0}, "block_q=0"),
        ({"feature_map": "exp"}, "'exp'; use one of"),
        ({"linear_scope": "some"}, "'some'; use one of"),
        ({"protect": (5, 2)}, r"protect=\(5, 2\)"),
        ({"fallback": "dense"}, "use 'error' or 'sdpa'"),
        ({"min_tokens": -1}, "negative"),
    ):
        with pytest.raises(ValueError, match=text):
            SLAConfig(**changes)
    with pytest.raises(ValueError, match=r"has no \['k'\]"):
        SLAConfig.from_dict({"k": 1})


def test_no_tokens_give_no_output():
    x = torch.zeros(1, 2, 0, 8)
    assert SparseLinearAttention(8)(x, x, x).shape == x.shape


def test_compiles_to_one_graph():
    q, k, v = draw(3, 1, 2, 64, 16, dtype=torch.float32).unbind()
    attention = SparseLinearAttention(16, SLAConfig(k_high=0.25, block_q=16, block_k=16))
    torch.nn.init.normal_(attention.proj.weight)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v), rtol=1e-5, atol=1e-6)

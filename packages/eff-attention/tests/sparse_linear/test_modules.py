import pytest
import torch
import torch.nn.functional as F
from eff_attention.sparse_linear import SLAConfig, SparseLinearAttention, tile_order


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_one_critical_share_is_dense_attention_whatever_the_projection():
    q, k, v = draw(3, 1, 2, 50, 8).unbind()
    attention = SparseLinearAttention(8, SLAConfig(k_high=1.0, k_low=0.0, block_q=16, block_k=16)).double()
    torch.nn.init.normal_(attention.proj.weight)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-12, atol=1e-12)


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
        ({"fallback": "dense"}, "use one of 'error', 'sdpa'"),
        ({"min_tokens": -1}, "negative"),
    ):
        with pytest.raises(ValueError, match=text):
            SLAConfig(**changes)
    with pytest.raises(ValueError, match=r"has no \['k'\]"):
        SLAConfig.from_dict({"k": 1})
    with pytest.raises(ValueError, match="SLAConfig of version 2"):
        SLAConfig.from_dict({**config.to_dict(), "version": 2})


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


def test_the_projection_adds_the_linear_branch():
    q, k, v = draw(3, 1, 4, 96, 16, dtype=torch.float32).unbind()
    k, v = k[:, :2], v[:, :2]
    attention = SparseLinearAttention(16, SLAConfig(k_high=0.2, block_q=16, block_k=16, linear_scope="noncritical"))
    sparse, linear, _ = attention.branches(q, k, v)
    assert torch.equal(attention(q, k, v), sparse)
    torch.nn.init.normal_(attention.proj.weight)
    wanted = sparse + F.linear(linear, attention.proj.weight, attention.proj.bias)
    torch.testing.assert_close(attention(q, k, v), wanted)
    narrow = attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wanted).norm() < 2e-2 * wanted.norm()


def test_a_projection_at_work_has_true_gradients():
    q, k, v = (x.clone().requires_grad_() for x in draw(3, 1, 2, 24, 8).unbind())
    attention = SparseLinearAttention(8, SLAConfig(k_high=0.3, k_low=0.3, block_q=4, block_k=4)).double()
    torch.nn.init.normal_(attention.proj.weight, std=0.1)
    names = [n for n, _ in attention.named_parameters()]

    def run(q, k, v, *values):
        return torch.func.functional_call(attention, dict(zip(names, values, strict=True)), (q, k, v))

    assert torch.autograd.gradcheck(run, (q, k, v, *attention.parameters()), fast_mode=True)


def test_float64_stays_float64():
    q = torch.randn(1, 2, 64, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = SparseLinearAttention(16, SLAConfig(k_high=1.0, k_low=0.0))(q, q, q)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert (found - wanted).abs().max() < 1e-13
    layer = SparseLinearAttention(16, SLAConfig(k_high=0.5, k_low=0.0, block_q=8, block_k=8))
    torch.nn.init.normal_(layer.proj.weight)
    branches = layer.branches(q, q, q)
    wanted = branches.sparse + branches.linear @ layer.proj.weight.double().mT
    assert (layer(q, q, q) - wanted).abs().max() < 1e-13

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from eff_attention.sparse_linear import (
    AttentionDistiller,
    SLAConfig,
    SparseLinearAttention,
    apply_sla,
    calibrate_sla,
    freeze_backbone,
    load_sla,
    save_sla,
    sla_modules,
    sla_parameters,
    token_level,
    token_linear_attention,
)
from hypothesis import given, settings
from hypothesis import strategies as st

LITE3R = SLAConfig(selection="token", k_high=0.3, k_low=0.0, feature_map="elu", linear_scope="all")


def draw(*sizes, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, *s, generator=generator, dtype=torch.float64).to(dtype) for s in sizes]


def brute(q, k, v, keep, always=()):
    """One query after another, ranked in Python."""
    out, linear = torch.empty(*q.shape[:-1], v.size(-1), dtype=q.dtype), torch.empty_like(q[..., :1] @ v[:, :1, :1])
    for h in range(q.size(1)):
        kv = h // (q.size(1) // k.size(1))
        phi_k = torch.where(k[0, kv] > 0, k[0, kv] + 1, k[0, kv].exp())
        for i, one in enumerate(q[0, h]):
            score = (k[0, kv] @ one) * q.size(-1) ** -0.5
            order = sorted(range(len(score)), key=lambda j, s=score: (j not in always, -float(s[j]), j))
            kept = order[: max(1, int(keep * len(score)), len(always))]
            out[0, h, i] = score[kept].softmax(0) @ v[0, kv, kept]
            weight = phi_k @ torch.where(one > 0, one + 1, one.exp())
            linear[0, h, i] = weight @ v[0, kv] / weight.sum()
    return out, linear


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    st.floats(0, 1),
    st.sampled_from([1, 100, 2**22]),
    st.integers(0, 999),
)
def test_every_query_has_its_own_keys(n, d, dv, heads, keep, scores, seed):
    q, k, v = draw((heads[0], n, d), (heads[1], n, d), (heads[1], n, dv), seed=seed)
    saved, token_level._SCORES = token_level._SCORES, scores
    try:
        found = token_linear_attention(q, k, v, keep=keep)
    finally:
        token_level._SCORES = saved
    sparse, linear = brute(q, k, v, keep)
    torch.testing.assert_close(found.sparse, sparse, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.linear, linear, rtol=1e-10, atol=1e-12)


def test_of_equal_scores_the_earlier_key_is_kept():
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 10, 4)
    v = torch.arange(10.0).view(1, 1, 10, 1)
    assert token_linear_attention(q, k, v, keep=0.4).sparse.flatten().tolist() == [1.5, 1.5]
    k[:, :, 6] = 1.5  # one above the equal ones leaves room for three of them
    weights = torch.tensor([1.0, 1.0, 1.0, math.e]) / (3 + math.e)
    found = token_linear_attention(q, k, v, keep=0.4).sparse
    torch.testing.assert_close(found.flatten(), (weights @ torch.tensor([0.0, 1.0, 2.0, 6.0])).expand(2))


def test_protected_keys_are_kept_by_every_query():
    q, k, v = draw((2, 20, 8), (2, 20, 8), (2, 20, 8))
    for span in ((3, 5), (2, 18)):
        found = token_linear_attention(q, k, v, keep=0.25, protect=span).sparse
        torch.testing.assert_close(found, brute(q, k, v, 0.25, range(*span))[0], rtol=1e-10, atol=1e-12)


def test_all_keys_are_plain_attention():
    q, k, v = draw((4, 33, 8), (2, 33, 8), (2, 33, 8))
    found = token_linear_attention(q, k, v, keep=1.0)
    wanted = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(found.sparse, wanted, rtol=1e-12, atol=1e-12)
    scores = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).mT).flatten(1, 2) * 8**-0.5
    torch.testing.assert_close(found.lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)


def test_the_order_of_keys_does_not_matter():
    q, k, v = draw((2, 40, 8), (2, 40, 8), (2, 40, 8))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    a, b = (token_linear_attention(q, x, y, keep=0.2) for x, y in ((k, v), (k[:, :, order], v[:, :, order])))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradients(monkeypatch):
    monkeypatch.setattr(token_level, "_SCORES", 2 * 12 * 5)  # in three goes
    leaves = [t.requires_grad_() for t in draw((2, 12, 4), (1, 12, 4), (1, 12, 3))]

    def run(q, k, v):
        return tuple(token_linear_attention(q, k, v, keep=0.4))

    assert torch.autograd.gradcheck(run, leaves)


def test_low_precision_is_near_float64():
    q, k, v = draw((2, 200, 32), (2, 200, 32), (2, 200, 32), dtype=torch.bfloat16)
    found = token_linear_attention(q, k, v, keep=0.3)
    exact = token_linear_attention(*(t.double() for t in (q, k, v)), keep=0.3)
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() < 1e-2 * b.norm()


def test_autocast_does_not_reach_the_sums():
    q, k, v = draw((2, 200, 32), (2, 200, 32), (2, 200, 32), dtype=torch.bfloat16)
    wanted = token_linear_attention(q, k, v, keep=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_linear_attention(q, k, v, keep=0.3)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_empty_sequences(lengths):
    q, k, v = draw((2, lengths[0], 8), (2, lengths[1], 8), (2, lengths[1], 6))
    found = token_linear_attention(q, k, v, keep=0.3)
    assert found.sparse.shape == found.linear.shape == (1, 2, lengths[0], 6)
    assert not found.sparse.any()


def test_module_adds_the_projection_and_compiles():
    q, k, v = draw((2, 48, 8), (2, 48, 8), (2, 48, 8), dtype=torch.float32)
    attention = SparseLinearAttention(8, LITE3R)
    sparse, linear = brute(*(t.double() for t in (q, k, v)), 0.3)
    torch.testing.assert_close(attention(q, k, v).double(), sparse, rtol=1e-5, atol=1e-6)
    torch.nn.init.normal_(attention.proj.weight)
    wanted = sparse + F.linear(linear, attention.proj.weight.double(), attention.proj.bias.double())
    torch.testing.assert_close(attention(q, k, v).double(), wanted, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v), rtol=1e-5, atol=1e-6)
    attention.sparsity = 0.0
    torch.nn.init.zeros_(attention.proj.weight)
    torch.testing.assert_close(attention(q, k, v), F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_settings():
    assert SLAConfig.from_dict(LITE3R.to_dict()) == LITE3R
    older = {k: v for k, v in SLAConfig().to_dict().items() if k != "selection"}
    assert SLAConfig.from_dict(older) == SLAConfig()  # as written before there was a choice
    for changes, text in (
        ({"selection": "row"}, "'row'; use one of"),
        ({"k_low": 0.1}, r"k_low=0 and linear_scope='all' are wanted, got k_low=0.1"),
        ({"block_q": 32}, "has no blocks; leave out block_q=32"),
        ({"linear_scope": "marginal"}, "got k_low=0.0, linear_scope='marginal'"),
    ):
        with pytest.raises(ValueError, match=text):
            dataclasses.replace(LITE3R, **changes)


@pytest.fixture
def vit():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTModel(ViTConfig(image_size=32, patch_size=4, initializer_range=0.1, **sizes)).eval()


def test_distilling_a_whole_model_and_taking_it_along(vit, tmp_path):
    picture = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    teacher = copy.deepcopy(vit)
    wanted = teacher(picture).last_hidden_state.detach()
    with apply_sla(vit, dataclasses.replace(LITE3R, k_high=0.05)):
        frozen = freeze_backbone(vit)
        optimizer, losses = torch.optim.AdamW(sla_parameters(vit), lr=1e-2, weight_decay=0.0), []
        with AttentionDistiller(vit, teacher, weight=lambda progress: 1.0) as distiller:
            for _ in range(30):
                with torch.no_grad():
                    teacher(picture)
                vit(picture)
                losses.append(distiller.loss())
                optimizer.zero_grad()
                losses[-1].backward()
                optimizer.step()
        assert losses[-1] < 0.97 * losses[0]
        frozen.remove()
        learnt = vit(picture).last_hidden_state
        save_sla(vit, tmp_path / "sla.safetensors")
    assert torch.equal(vit(picture).last_hidden_state, wanted)
    with load_sla(vit, tmp_path / "sla.safetensors"):
        assert [m.config.selection for _, m in sla_modules(vit)] == ["token"] * 2
        assert torch.equal(vit(picture).last_hidden_state, learnt)
        assert all(f.fitted < f.sparse for f in calibrate_sla(vit, [{"pixel_values": picture}]))

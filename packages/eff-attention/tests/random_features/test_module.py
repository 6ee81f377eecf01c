import pytest
import torch
from eff_attention.random_features import RandomFeatureAttention
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer(**changes):
    return RandomFeatureAttention(**({"dim": 4, "num_heads": 6, "scale": 0.5} | changes)).double()


def inputs(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["relu", "softmax", torch.tanh])
def test_forward_is_the_formula(causal, activation):
    attention = layer(causal=causal, activation=activation, out_dim=3)
    x = inputs(2, 5, 4)
    tilde = torch.cat([0.5 * x, torch.ones(2, 5, 1)], -1)
    for b in range(2):
        for t in range(5):
            seen = tilde[b, : t + 1] if causal else tilde[b]
            scores = torch.einsum("a,mab,ib->mi", tilde[b, t], attention.weight_dense, seen)
            if activation == "softmax":
                weights = scores.softmax(-1)
            else:
                weights = (scores.relu() if activation == "relu" else scores.tanh()) / len(seen)
            wanted = torch.einsum("mi,ib,mbc->c", weights, seen, attention.v) / 6**0.5
            torch.testing.assert_close(attention(x)[b, t], wanted, rtol=1e-12, atol=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)),
    causal=st.booleans(),
    rank=st.sampled_from([None, 2]),
    chunk=st.sampled_from([None, 1, 4]),
    cross=st.booleans(),
)
def test_shapes_chunks_and_features(sizes, causal, rank, chunk, cross):
    batch, length, num_keys = sizes
    attention = layer(causal=causal, rank=rank, head_chunk=chunk, out_dim=3, query_dim=2 if cross else None)
    x = inputs(batch, num_keys, 4)
    query = inputs(batch, min(length, num_keys) if causal else length, 2) if cross else None
    out = attention(x, query)
    assert out.shape == (batch, num_keys if query is None else query.shape[1], 3)
    torch.testing.assert_close(out, attention.features(x, query) @ attention.v.flatten(0, 1), rtol=1e-11, atol=1e-12)
    assert out.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_the_sequence_alone(activation, causal):
    attention = layer(activation=activation, causal=causal)
    x = inputs(3, 6, 4)
    lengths = [6, 2, 0]
    padding = torch.arange(6) >= torch.tensor(lengths)[:, None]
    x[padding] = float("nan")
    out = attention(x, key_padding_mask=padding)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(out[b, :length], attention(x[b : b + 1, :length])[0], rtol=1e-12, atol=1e-13)
    assert out.isfinite().all()
    assert attention(x[2:], inputs(1, 2, 4)[:, :1], key_padding_mask=padding[2:]).eq(0).all()


def test_causal_queries_are_the_last_ones():
    attention = layer(causal=True)
    x = inputs(2, 6, 4)
    torch.testing.assert_close(attention(x, x[:, 4:]), attention(x)[:, 4:])
    future = x.clone()
    future[:, 5] += 1
    assert torch.equal(attention(future)[:, :5], attention(x)[:, :5])
    with pytest.raises(ValueError, match="3 queries for 2 keys"):
        attention(x[:, :2], x[:, :3])


def test_only_the_values_train():
    attention = RandomFeatureAttention(4, 6)
    assert [name for name, _ in attention.named_parameters()] == ["v"]
    before = attention.weight_dense.clone()
    optimizer = torch.optim.SGD(attention.parameters(), lr=0.1)
    attention(torch.randn(2, 3, 4)).square().mean().backward()
    optimizer.step()
    assert attention.v.grad.abs().sum() > 0
    assert torch.equal(attention.weight_dense, before)
    other = RandomFeatureAttention(4, 6, seed=9)
    other.load_state_dict(attention.state_dict())
    x = torch.randn(2, 3, 4)
    assert torch.equal(other(x), attention(x))
    assert torch.equal(RandomFeatureAttention(4, 6).weight_dense, before)
    assert not torch.equal(RandomFeatureAttention(4, 6, seed=9).weight_dense, before)


@pytest.mark.parametrize("activation", ["softmax", torch.tanh])
def test_gradients(activation):
    attention = layer(activation=activation, causal=True)
    x = inputs(1, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, v: torch.func.functional_call(attention, {"v": v}, (x,)), (x, attention.v)
    )


def test_fit_closed_form_is_ridge_of_the_features():
    attention = layer(out_dim=2)
    batches = [(inputs(2, 5, 4), inputs(2, 5, 2)) for _ in range(4)]
    loss = attention.fit_closed_form(batches, alpha=0.01)
    phi = torch.cat([attention.features(x).flatten(0, 1) for x, _ in batches])
    y = torch.cat([y.flatten(0, 1) for _, y in batches])
    wanted = torch.linalg.solve(phi.T @ phi + len(y) * 0.01 * torch.eye(phi.shape[1], dtype=phi.dtype), phi.T @ y)
    torch.testing.assert_close(attention.v.flatten(0, 1), wanted, rtol=1e-9, atol=1e-10)
    got = torch.cat([attention(x).flatten(0, 1).detach() for x, _ in batches])
    assert loss == pytest.approx(float((got - y).square().mean()), rel=1e-9)


def test_fit_closed_form_finds_a_layer_of_the_same_heads_in_float32():
    teacher, student = RandomFeatureAttention(4, 3), RandomFeatureAttention(4, 3)
    with torch.no_grad():
        teacher.v.normal_()
        x = torch.nn.functional.normalize(torch.randn(40, 6, 4), dim=-1)
        padding = torch.arange(6).expand(40, 6) >= torch.randint(2, 7, (40, 1))
        y = teacher(x, key_padding_mask=padding)
        x[padding], y[padding] = float("nan"), float("nan")
    loss = student.fit_closed_form(
        [(x[i : i + 8], None, y[i : i + 8], padding[i : i + 8]) for i in range(0, 40, 8)], alpha=1e-10
    )
    assert loss < 1e-10
    torch.testing.assert_close(student.v, teacher.v, rtol=1e-2, atol=1e-2)


def test_fit_closed_form_with_queries():
    attention = layer(out_dim=1)
    x, query, y = inputs(30, 5, 4), inputs(30, 1, 4), inputs(30, 1, 1)
    assert attention.fit_closed_form([(x, query, y)], alpha=1e-9) < float(y.square().mean())
    with pytest.raises(ValueError, match="no tokens"):
        attention.fit_closed_form([], alpha=1.0)
    with pytest.raises(ValueError, match="alpha=0"):
        attention.fit_closed_form([(x, query, y)], alpha=0)
    with pytest.raises(ValueError, match="targets have shape"):
        attention.fit_closed_form([(x, y)], alpha=1.0)
    with pytest.raises(ValueError, match="1 entries"):
        attention.fit_closed_form([(x,)], alpha=1.0)
    before = attention.v.clone()
    with pytest.raises(ValueError, match="not finite"):
        attention.fit_closed_form([(x, query, y / 0)], alpha=1.0)
    assert torch.equal(attention.v, before)


def test_frozen_products_of_another_layer():
    q, k = inputs(6, 2, 5), inputs(6, 2, 5)
    attention = layer(query_key=(q, k))
    dense = layer()
    dense.weight_dense.copy_(torch.einsum("mra,mrb->mab", q, k).float())
    dense.load_state_dict({"v": attention.v}, strict=False)
    x = inputs(2, 3, 4)
    torch.testing.assert_close(attention(x), dense(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"wanted \[6, r, 5\]"):
        layer(query_key=(q[:, :, :4], k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    attention = RandomFeatureAttention(16, 32, scale=0.25, causal=True)
    x = torch.randn(2, 20, 16)
    wanted = attention(x)
    got = attention.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.float() - wanted).norm() / wanted.norm() < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_compiles_whole():
    attention = RandomFeatureAttention(4, 6, causal=True, head_chunk=4)
    x = torch.randn(2, 7, 4)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), attention(x))
    padding = torch.arange(7).expand(2, 7) >= 5
    torch.testing.assert_close(compiled(x, key_padding_mask=padding), attention(x, key_padding_mask=padding))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda a: a(torch.zeros(2, 3)), r"wanted keys \[B, N, C\]"),
        (lambda a: a(torch.zeros(2, 3, 5)), r"have \(5, 5\) channels, the layer takes \(4, 4\)"),
        (lambda a: a(torch.zeros(2, 3, 4), torch.zeros(3, 1, 4)), "queries"),
        (lambda a: a(torch.zeros(2, 3, 4), key_padding_mask=torch.zeros(2, 3)), "torch.bool"),
        (lambda a: RandomFeatureAttention(4, 6, head_chunk=0), "head_chunk=0"),
        (lambda a: RandomFeatureAttention(4, 6, activation="gelu"), "gelu"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call(RandomFeatureAttention(4, 6))

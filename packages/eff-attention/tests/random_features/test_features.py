import itertools
import math

import numpy as np
import pytest
import torch
from eff_attention.random_features import HeadWeights, arc_cosine, attention_features, attention_kernel, sample_heads
from eff_attention.random_features.features import append_ones
from eff_attention.random_features.sampling import mean_weights
from hypothesis import given, settings
from hypothesis import strategies as st


def random(seed=0):
    return np.random.RandomState(seed)


def sphere(*shape, seed=0):
    x = torch.from_numpy(random(seed).standard_normal(shape))
    return x / x.norm(dim=-1, keepdim=True)


def loop(query, keys, dense, keep, activation):
    """The formula as it is written, one number after another."""
    num_heads, batch, length = len(dense), len(query), query.shape[1]
    out = torch.zeros(batch, length, num_heads, keys.shape[2], dtype=torch.float64)
    for b, t, m in itertools.product(range(batch), range(length), range(num_heads)):
        used = [i for i in range(keys.shape[1]) if keep is None or keep[b, i]]
        scores = [float(query[b, t] @ dense[m] @ keys[b, i]) for i in used]
        if activation == "softmax":
            total = sum(math.exp(s) for s in scores)
            weights = [math.exp(s) / total for s in scores]
        else:
            weights = [max(s, 0.0) / len(used) for s in scores]
        for weight, i in zip(weights, used, strict=True):
            out[b, t, m] += weight * keys[b, i] / math.sqrt(num_heads)
    return out


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 4) for _ in range(6))),
    activation=st.sampled_from(["relu", "softmax"]),
    masked=st.booleans(),
    rank=st.sampled_from([None, 1, 3]),
    mean=st.booleans(),
)
def test_features_are_the_formula(sizes, activation, masked, rank, mean):
    batch, length, num_keys, num_heads, query_dim, key_dim = sizes
    offset = random(7).standard_normal((query_dim, key_dim)) if mean else None
    heads = sample_heads(num_heads, query_dim, key_dim, random(1), mean=offset, rank=rank)
    dense = heads.dense
    if rank is not None:
        dense = torch.einsum("mra,mrb->mab", heads.query, heads.key) + (
            0 if offset is None else torch.from_numpy(offset)
        )
    assert dense.shape == (num_heads, heads.query_dim, heads.key_dim) == (num_heads, query_dim, key_dim)
    assert heads.num_heads == num_heads
    query, keys = sphere(batch, length, query_dim, seed=2), sphere(batch, num_keys, key_dim, seed=3)
    keep = torch.from_numpy(random(4).rand(batch, num_keys) < 0.6) if masked else None
    got = attention_features(query, keys, heads, activation=activation, keep=None if keep is None else keep[:, None])
    torch.testing.assert_close(got, loop(query, keys, dense, keep, activation), rtol=1e-12, atol=1e-14)


def test_a_query_without_keys_has_features_of_zero():
    heads = sample_heads(3, 4, 4, random())
    none = torch.zeros(1, 1, 2, dtype=torch.bool)
    for activation in ("relu", "softmax"):
        out = attention_features(sphere(1, 1, 4), sphere(1, 2, 4), heads, activation=activation, keep=none)
        assert torch.equal(out, torch.zeros_like(out))
        assert (
            attention_features(sphere(1, 1, 4), torch.zeros(1, 0, 4).double(), heads, activation=activation).eq(0).all()
        )
        assert attention_features(torch.zeros(1, 0, 4).double(), sphere(1, 2, 4), heads).shape == (1, 0, 3, 4)


def test_low_rank_and_dense_scores_have_variance_one():
    x, y = append_ones(sphere(1, 5, seed=1)), append_ones(sphere(1, 5, seed=2))
    for rank in (None, 1, 2, 8):
        heads = sample_heads(200_000, 6, 6, random(3), rank=rank)
        scores = heads.project(x)[0] @ y[0]
        assert float(scores.var()) == pytest.approx(1, rel=0.05), rank
        assert float(scores.mean()) == pytest.approx(0, abs=0.01)


def test_kernel_is_the_limit_of_the_features():
    query, keys = append_ones(sphere(2, 1, 4, seed=1)), append_ones(sphere(2, 5, 4, seed=2))
    keep = torch.tensor([[True] * 5, [True, True, False, True, False]])
    wanted = attention_kernel(query[:, 0], keys, query[:, 0], keys, keep=keep, other_keep=keep)
    products = []
    for seed in range(40):
        phi = attention_features(query, keys, sample_heads(4096, 5, 5, random(seed)), keep=keep[:, None]).flatten(1)
        products.append(phi @ phi.T)
    stacked = torch.stack(products)
    error = stacked.std(0) / math.sqrt(len(stacked))
    assert ((stacked.mean(0) - wanted).abs() < 3 * error).all()
    assert (error < 0.01 * wanted.abs().max()).all()  # close enough to tell a wrong formula


def test_arc_cosine_by_sampling():
    s = torch.from_numpy(random().standard_normal((2, 2_000_000)))
    for c in (-1.0, -0.5, 0.0, 0.3, 1.0):
        mixed = c * s[0] + math.sqrt(1 - c * c) * s[1]
        got = float(arc_cosine(torch.tensor(c, dtype=torch.float64)))
        assert got == pytest.approx(float((s[0].relu() * mixed.relu()).mean()), abs=0.002)


def test_kernel_blocks_symmetry_and_zero_vectors():
    query, keys = sphere(70, 3, seed=1), sphere(70, 30, 3, seed=2)  # several blocks of 65536 terms
    query[0], keys[1, 0] = 0, 0
    whole = attention_kernel(query, keys, query, keys)
    parts = attention_kernel(query, keys, query.clone(), keys.clone())
    torch.testing.assert_close(whole, whole.T, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-14)
    assert whole[0].eq(0).all()
    assert torch.linalg.eigvalsh(whole).min() > -1e-12


def test_mean_weights():
    assert mean_weights(0.0, 3, 3, append_one=True) is None
    np.testing.assert_array_equal(mean_weights("identity", 3, 3, append_one=True), np.diag([1.0, 1.0, 0.0]))
    np.testing.assert_array_equal(mean_weights(2.0, 2, 2, append_one=False), np.diag([2.0, 2.0]))
    given_mean = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(mean_weights(given_mean, 2, 3, append_one=True), given_mean)
    for bad, text in (("eye", "eye"), (np.zeros((2, 2)), "shape"), (1.0, "one size")):
        with pytest.raises(ValueError, match=text):
            mean_weights(bad, 2, 3, append_one=True)


def test_same_state_gives_the_same_heads_and_parts_fit():
    one, two = (sample_heads(6, 3, 3, random(5), rank=2) for _ in range(2))
    assert torch.equal(one.query, two.query)
    x = sphere(4, 3)
    torch.testing.assert_close(one.heads(slice(2, 5)).project(x), two.project(x)[:, 2:5])


@pytest.mark.parametrize(("name", "value"), [("num_heads", 0), ("rank", 0), ("std", -1.0), ("std", math.nan)])
def test_sampling_refuses(name, value):
    arguments = {"num_heads": 2, "rank": 1, "std": 0.5} | {name: value}
    with pytest.raises(ValueError, match=r"at least"):
        sample_heads(query_dim=2, key_dim=2, random=random(), **arguments)


def test_weights_without_matrices_are_refused():
    with pytest.raises(ValueError, match="dense"):
        HeadWeights().project(torch.zeros(1, 2))

import pickle

import numpy as np
import pytest
import torch
from eff_attention.random_features import (
    RandomFeatureAttentionClassifier,
    RandomFeatureAttentionRegressor,
    RFAKernelRidge,
    sample_sets,
)
from eff_attention.random_features import base as base_module
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

QUERIES = ["first", "mean", "self", "constant"]


def data(n=40, num_keys=6, dim=3, seed=0):
    random = np.random.RandomState(seed)
    x = sample_sets(n, num_keys, dim, random)
    return x, (x[:, 1:, 0] ** 2).mean(1) + 0.3 * x[:, 0, 1]


def regressor(**changes):
    return RandomFeatureAttentionRegressor(**({"n_heads": 20, "random_state": 3, "alpha": 1e-3} | changes))


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("activation", ["relu", "softmax", torch.tanh])
def test_order_and_number_of_keys_do_not_matter(query, activation):
    x, y = data()
    model = regressor(query=query, activation=activation).fit(x, y)
    wanted = model.predict(x)
    order = np.random.RandomState(1).permutation(6) + 1
    np.testing.assert_allclose(model.predict(x[:, [0, *order]]), wanted, atol=1e-12)
    if query == "first":
        np.testing.assert_allclose(model.predict(np.concatenate([x, x[:, 1:]], 1)), wanted, atol=1e-12)
    assert np.ptp(wanted) > 0.05


def test_prediction_is_the_triple_loop_and_the_features_times_coef():
    x, y = data(5, 2, 2)
    model = regressor(n_heads=3, normalize=False).fit(x, y)
    v, w = model.coef_.reshape(3, 3), model.heads_.dense.numpy()
    for sample, got in zip(x, model.predict(x), strict=True):
        query, total = np.append(sample[0], 1), 0.0
        for m in range(3):
            for i in (1, 2):
                key = np.append(sample[i], 1)
                total += max(query @ w[m] @ key, 0) * (v[m] @ key) / (2 * np.sqrt(3))
        assert got == pytest.approx(total + model.intercept_, abs=1e-12)
    np.testing.assert_allclose(model.transform(x) @ model.coef_ + model.intercept_, model.predict(x), atol=1e-13)


@pytest.mark.parametrize("query", QUERIES)
def test_lists_of_sets_are_their_samples_one_by_one(query):
    x, y = data()
    lengths = np.random.RandomState(2).randint(2, 8, len(x))
    sets = [sample[:length] for sample, length in zip(x, lengths, strict=True)]
    model = regressor(query=query).fit(sets, y)
    alone = [model.predict([one])[0] for one in sets]
    np.testing.assert_allclose(model.predict(sets), alone, atol=1e-12)
    np.testing.assert_allclose(model.predict(sets), [model.predict(one[None])[0] for one in sets], atol=1e-12)
    assert len(cross_val_score(model, sets, y, cv=2)) == 2


def test_masked_keys_may_hold_anything():
    x, y = data()
    keep = np.random.RandomState(2).rand(len(x), 6) < 0.7
    keep[:, 0] = True
    spoilt = np.where(keep[..., None], x[:, 1:], np.nan)
    model = regressor().fit((x[:, 0], spoilt, keep), y)
    alone = [model.predict((s[:1], s[1:][k][None]))[0] for s, k in zip(x, keep, strict=True)]
    np.testing.assert_allclose(model.predict((x[:, 0], spoilt, keep)), alone, atol=1e-12)
    whole = regressor().fit((x[:, 0], x[:, 1:]), y)
    np.testing.assert_allclose(whole.predict((x[:, 0], x[:, 1:], None)), regressor().fit(x, y).predict(x), atol=1e-12)


def test_queries_and_keys_of_different_sizes():
    x, y = data()
    wide = np.concatenate([x, x[..., :1] ** 2], -1)
    model = regressor().fit((x[:, 0], wide[:, 1:]), y)
    assert model.transform((x[:, 0], wide[:, 1:])).shape == (40, 20 * 5)
    with pytest.raises(ValueError, match="one size"):
        regressor(weight_mean="identity").fit((x[:, 0], wide[:, 1:]), y)


@pytest.mark.parametrize("rank", [None, 2])
def test_features_do_not_depend_on_blocks(rank, monkeypatch):
    x, y = data()
    wanted = regressor(rank=rank).fit(x, y)
    monkeypatch.setattr(base_module, "CACHE_BYTES", 0)
    monkeypatch.setattr(base_module, "BLOCK_BYTES", 8 * 40 * 4 * 7)  # seven heads at a time
    for solver in ("dual", "primal", "cg"):
        model = regressor(rank=rank, chunk_size=7, solver=solver).fit(x, y)
        np.testing.assert_allclose(model.transform(x), wanted.transform(x), atol=1e-14)
        np.testing.assert_allclose(model.coef_, wanted.coef_, rtol=1e-6, atol=1e-8)


def test_identity_mean_without_spread_is_the_inner_product():
    x, y = data(10)
    model = regressor(weight_mean="identity", weight_std=0.0, normalize=False).fit(x, y)
    phi = model.transform(x).reshape(10, 20, 4)
    scores = np.maximum(np.einsum("nd,nid->ni", x[:, 0], x[:, 1:]), 0)
    keys = np.concatenate([x[:, 1:], np.ones((10, 6, 1))], -1)
    wanted = np.einsum("ni,nid->nd", scores, keys) / 6 / np.sqrt(20)
    for m in range(20):
        np.testing.assert_allclose(phi[:, m], wanted, rtol=1e-14, atol=1e-16)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 12),
    num_keys=st.integers(1, 5),
    dim=st.integers(1, 4),
    targets=st.integers(0, 3),
    query=st.sampled_from(QUERIES),
    alpha=st.sampled_from(["gcv", "loo", 0.0, 0.1]),
)
def test_shapes(n, num_keys, dim, targets, query, alpha):
    random = np.random.RandomState(n)
    x = random.standard_normal((n, num_keys + 1, dim))
    y = random.standard_normal((n, targets) if targets else n)
    model = regressor(n_heads=4, query=query, alpha=alpha).fit(x, y)
    assert model.predict(x).shape == y.shape
    assert np.isfinite(model.predict(x)).all()
    if query != "self":
        assert RFAKernelRidge(query=query, alpha=alpha).fit(x, y).predict(x).shape == y.shape


def test_several_targets_are_the_targets_one_by_one():
    x, y = data()
    both = np.stack([y, y**2], 1)
    model = regressor().fit(x, both)
    np.testing.assert_allclose(model.predict(x)[:, 1], regressor().fit(x, both[:, 1]).predict(x), atol=1e-12)


def test_scale_of_the_inputs_does_not_matter():
    x, y = data()
    np.testing.assert_allclose(
        regressor().fit(50 * x, y).predict(50 * x), regressor().fit(x, y).predict(x), rtol=1e-9, atol=1e-9
    )
    assert regressor().fit(50 * x, y).key_scale_ == pytest.approx(50)


def test_choice_of_the_penalty_is_kept():
    x, y = data()
    for criterion in ("gcv", "loo"):
        model = regressor(alpha=criterion, alphas=[1e-6, 1e-3, 1.0]).fit(x, y)
        assert model.alpha_path_.shape == (3, 2)
        assert model.alpha_ == model.alpha_path_[model.alpha_path_[:, 1].argmin(), 0]
        assert model.solver_ == "dual"
        assert model.dual_coef_.shape == (40,)


def test_kernel_ridge_is_the_limit_of_many_heads():
    x, y = data(60)
    fresh = data(30, seed=9)[0]
    for intercept in (True, False):
        limit = RFAKernelRidge(alpha=1e-4, fit_intercept=intercept).fit(x, y).predict(fresh)
        mean = np.mean(
            [
                regressor(n_heads=2000, alpha=1e-4, fit_intercept=intercept, random_state=s).fit(x, y).predict(fresh)
                for s in range(5)
            ],
            0,
        )
        assert np.abs(mean - limit).max() < 0.02 * np.ptp(y)


def test_kernel_ridge_with_masks_is_each_sample_alone():
    x, y = data()
    sets = [s[: 2 + i % 5] for i, s in enumerate(x)]
    model = RFAKernelRidge(alpha=1e-3).fit(sets, y)
    np.testing.assert_allclose(model.predict(sets), [model.predict([s])[0] for s in sets], atol=1e-9)


# The data of these checks are features in a fixed order. Read as a set of numbers they lose that order, and no model of
# sets can tell the classes; the checks of the score alone do not apply.
SCORES = dict.fromkeys(("check_regressors_train", "check_classifiers_train"), "asks for a score on features in order")


@pytest.mark.parametrize(
    "model",
    [
        RandomFeatureAttentionRegressor(64, token_dim=1, query="mean", random_state=0),
        RandomFeatureAttentionClassifier(64, token_dim=1, query="mean", random_state=0),
        RandomFeatureAttentionClassifier(64, head="logistic", alpha=1e-3, token_dim=1, query="mean", random_state=0),
    ],
    ids=["regressor", "ridge", "logistic"],
)
@pytest.mark.filterwarnings("ignore")  # checks convert columns, skip what needs an array API, stop solvers early
def test_check_estimator(model):
    results = check_estimator(model, on_fail=None, expected_failed_checks=SCORES)
    failed = [r["check_name"] for r in results if r["status"] not in ("passed", "skipped", "xfail")]
    assert failed == []
    assert sum(r["status"] == "passed" for r in results) > 50
    assert {r["check_name"] for r in results if r["status"] == "xfail"} <= set(SCORES)


def test_pipelines_and_searches_of_flat_samples():
    x, y = data()
    flat = x.reshape(len(x), -1)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), regressor(token_dim=3)),
        {"randomfeatureattentionregressor__n_heads": [5, 10]},
        cv=2,
    )
    assert search.fit(flat, y).predict(flat).shape == y.shape
    plain = regressor(token_dim=3).fit(flat, y)
    np.testing.assert_allclose(plain.predict(flat), regressor().fit(x, y).predict(x), atol=1e-12)
    assert plain.n_features_in_ == 21
    assert cross_val_score(regressor(n_heads=200, alpha="gcv"), x, y, cv=2).mean() > 0.5


def test_clone_pickle_and_seed():
    x, y = data()
    model = regressor(weight_mean="identity").fit(x, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(x), model.predict(x))
    np.testing.assert_array_equal(clone(model).fit(x, y).predict(x), model.predict(x))
    assert not np.allclose(regressor(random_state=4).fit(x, y).predict(x), model.predict(x))


def classes(n=400):
    x, y = data(n)
    return x, np.array(["low", "mid", "top"])[np.digitize(y, np.quantile(y, [1 / 3, 2 / 3]))]


@pytest.mark.parametrize("head", ["ridge", "logistic"])
def test_classifier(head):
    x, y = classes()
    model = RandomFeatureAttentionClassifier(200, head=head, alpha=1e-5, random_state=0).fit(x[:300], y[:300])
    assert model.score(x[300:], y[300:]) > 0.7  # a guess: 0.33
    assert model.decision_function(x).shape == (400, 3)
    two = RandomFeatureAttentionClassifier(50, head=head, alpha=1e-4, random_state=0).fit(x, y == "top")
    assert two.decision_function(x).shape == (400,)
    assert two.predict(x).dtype == bool
    if head == "logistic":
        assert np.allclose(model.predict_proba(x).sum(1), 1)
        assert (model.classes_[model.predict_proba(x).argmax(1)] == model.predict(x)).all()
    else:
        assert not hasattr(model, "predict_proba")


NOT_THREE = "2 dimensions"


@pytest.mark.parametrize(
    ("changes", "samples", "text"),
    [
        ({}, np.zeros((4, 3)), NOT_THREE),
        ({}, np.zeros((4, 3, 2, 1)), "shape"),
        ({}, np.zeros((4, 1, 2)), "first token is the query"),
        ({}, np.full((4, 3, 2), np.nan), "NaN"),
        ({}, np.zeros((0, 3, 2)), "0 sample"),
        ({}, (np.zeros((4, 2)),), "1 entries"),
        ({}, (np.zeros((4, 2)), np.zeros((3, 3, 2))), r"wanted \(4, N"),
        ({}, (np.zeros((4, 2)), np.zeros((4, 3, 2)), np.ones((4, 3))), "bool"),
        ({}, (np.zeros((4, 2)), np.zeros((4, 3, 2)), np.zeros((4, 3), bool)), "4 have none, the first is sample 0"),
        ({}, (np.zeros((4, 2)), np.zeros((4, 0, 2))), "at least one key"),
        ({}, [np.zeros((2, 3)), np.zeros((2, 4)), np.zeros((2, 3)), np.zeros((2, 3))], "different dimensions"),
        ({"token_dim": 2}, np.zeros((4, 3)), "multiple of token_dim=2"),
        ({"query": "last"}, np.zeros((4, 3, 2)), "query='last'"),
        ({"alpha": "aic"}, np.zeros((4, 3, 2)), "alpha='aic'"),
        ({"alpha": -1.0}, np.zeros((4, 3, 2)), "alpha=-1.0"),
        ({"alphas": [0.0]}, np.zeros((4, 3, 2)), "penalties above 0"),
        ({"n_heads": 0}, np.zeros((4, 3, 2)), "n_heads=0"),
        ({"rank": 1.5}, np.zeros((4, 3, 2)), "rank=1.5"),
        ({"activation": "gelu"}, np.zeros((4, 3, 2)), "activation='gelu'"),
        ({"weight_mean": "eye"}, np.zeros((4, 3, 2)), "weight_mean='eye'"),
    ],
)
def test_refusals(changes, samples, text):
    with pytest.raises(ValueError, match=text):
        regressor(**changes).fit(samples, np.arange(4.0))


def test_refusals_after_the_fit():
    x, y = data()
    model = regressor()
    with pytest.raises(NotFittedError):
        model.predict(x)
    model.fit(x, y)
    with pytest.raises(ValueError, match=r"\(2, 2\) features, the estimator was fitted with \(3, 3\)"):
        model.predict(x[..., :2])
    for bad in (y[:-1], np.full_like(y, np.inf), np.zeros((40, 2, 2))):
        with pytest.raises(ValueError, match=r"samples and y|infinity|y has shape|dim 3"):
            regressor().fit(x, bad)
    with pytest.raises(ValueError, match="head='svm'"):
        RandomFeatureAttentionClassifier(head="svm").fit(x, y > 0)
    with pytest.raises(ValueError, match="at least two"):
        RandomFeatureAttentionClassifier().fit(x, np.zeros(40, int))
    with pytest.raises(ValueError, match="above 0 for alpha"):
        RandomFeatureAttentionClassifier(head="logistic").fit(x, y > 0)
    kernel = RFAKernelRidge(alpha=1e-3)
    with pytest.raises(NotFittedError):
        kernel.predict(x)
    with pytest.raises(ValueError, match="fitted with"):
        kernel.fit(x, y).predict(x[..., :2])
    with pytest.raises(ValueError, match="no closed-form kernel"):
        RFAKernelRidge(query="self").fit(x, y)


def test_ragged_lists_are_sets_or_are_named():
    from eff_attention.random_features.inputs import as_sets

    ragged = [[[1.0, 2], [3, 4], [5, 6]], [[7, 8], [9, 10]]]
    found, wanted = as_sets(ragged, "mean", None), as_sets([np.array(s, float) for s in ragged], "mean", None)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="tokens of a sample have different lengths"):
        as_sets([[[1.0, 2], [3]], [[7, 8]]], "mean", None)
    with pytest.raises(ValueError, match=r"samples have shapes \[\(2,\), \(1,\)\]"):
        as_sets([[1.0, 2], [3]], "mean", None)

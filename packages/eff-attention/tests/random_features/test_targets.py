import subprocess
import sys

import numpy as np
import pytest
from eff_attention.random_features import (
    TARGETS,
    RandomFeatureAttentionRegressor,
    RandomFeatureMLPRegressor,
    sample_complexity_curve,
    sample_sets,
)

HEADS = 300
MODELS = {
    "RFA": lambda seed: RandomFeatureAttentionRegressor(HEADS, random_state=100 + seed),
    "BRFA": lambda seed: RandomFeatureAttentionRegressor(HEADS, weight_mean="identity", random_state=100 + seed),
    "RFMLP": lambda seed: RandomFeatureMLPRegressor(5 * HEADS, random_state=100 + seed),
}


def errors(target, models, n=512):
    points = list(sample_complexity_curve(target, {m: MODELS[m] for m in models}, [n], [0, 1, 2]))
    assert [p.seed for p in points] == sorted([0, 1, 2] * len(models))
    return {m: np.mean([p.error for p in points if p.model == m]) for m in models}


def test_what_one_layer_of_attention_learns():
    keys = errors("mean <b,x>^2", ["RFA", "BRFA", "RFMLP"])
    assert keys["RFA"] < 0.05
    assert keys["RFMLP"] > 0.9
    assert keys["RFA"] < keys["BRFA"]
    correlated = errors("mean <x0,x>^2 <b,x>", ["RFA", "BRFA"])
    assert correlated["BRFA"] < 0.6 * correlated["RFA"]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_targets_are_their_names(name):
    x = sample_sets(6, 5, 4, np.random.RandomState(0))
    b = np.array([1.0, -2.0, 3.0, -4.0]) / np.sqrt(30)
    turn = np.array([[0, 0, 0, -1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]) if "Sx" in name else np.eye(4)
    power = int(name.partition("^")[2][0])
    for sample, got in zip(x, TARGETS[name](x), strict=True):
        query, keys = sample[0], sample[1:]
        if name.startswith("<b,x0>"):
            wanted = (b @ query) ** power
        elif name.startswith("mean <b,x>"):
            wanted = np.mean([(b @ k) ** power for k in keys])
        else:
            wanted = np.mean([(query @ (turn @ k)) ** power * (b @ k) for k in keys])
        assert got == pytest.approx(wanted, abs=1e-14)


def test_curves_share_their_samples():
    seen = {}

    class Spy(RandomFeatureMLPRegressor):
        def fit(self, X, y):
            seen[(self.random_state, len(X))] = X.copy(), y.copy()
            return super().fit(X, y)

    points = list(
        sample_complexity_curve("<b,x0>^2", {"m": lambda s: Spy(20, random_state=s)}, [8, 16], [0, 1], noise=0.1)
    )
    assert [(p.n, p.seed) for p in points] == [(8, 0), (16, 0), (8, 1), (16, 1)]
    np.testing.assert_array_equal(seen[0, 8][0], seen[0, 16][0][:8])
    assert not np.array_equal(seen[0, 8][0], seen[1, 8][0])
    assert np.abs(seen[0, 16][1] - TARGETS["<b,x0>^2"](seen[0, 16][0])).max() > 0.001

    def mine(x):
        return x[:, 0, 0]

    assert next(sample_complexity_curve(mine, {"m": lambda s: Spy(20)}, [8], [0])).target == "mine"
    with pytest.raises(ValueError, match="target='cube'"):
        next(sample_complexity_curve("cube", {}, [8], [0]))


def test_the_baseline_fits_what_depends_on_order():
    x = sample_sets(400, 3, 2, np.random.RandomState(0))
    y = x[:, 1, 0] - x[:, 2, 0]
    model = RandomFeatureMLPRegressor(300, random_state=0).fit(x[:300], y[:300])
    assert model.score(x[300:], y[300:]) > 0.95
    attention = RandomFeatureAttentionRegressor(60, random_state=0).fit(x[:300], y[:300])
    assert attention.score(x[300:], y[300:]) < 0.1


def test_the_module_needs_no_scikit_learn():
    code = """
import sys
sys.modules["sklearn"] = None
import eff_attention.random_features as rf
rf.RandomFeatureAttention(4, 2)
try:
    rf.RandomFeatureAttentionRegressor
except ImportError as error:
    print(error)
try:
    rf.nothing
except AttributeError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "eff-attention[sklearn]"' in out
    assert "no attribute 'nothing'" in out

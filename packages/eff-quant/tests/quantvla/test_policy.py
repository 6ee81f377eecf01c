"""The trained policy of ``bench/vla``: what the layout and the matching of attention scales do to it."""

import importlib
import math
import sys
from pathlib import Path

import pytest
from eff_quant import collect_attention_stats

pytest.importorskip("diffusers", reason="the policy's head is of its classes")
pytest.importorskip("transformers", reason="the policy's language model is of its classes")

BENCH = Path(__file__).parents[2] / "bench" / "vla"


@pytest.fixture
def bench(monkeypatch):
    """The benchmark's module ``_ways``."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("_ways")
    for name in ("_ways", "_policy", "_task"):
        del sys.modules[name]


@pytest.fixture
def teacher(bench):
    """The policy in full precision."""
    return sys.modules["_policy"].load()


def test_attention_of_the_head_is_what_four_bits_hurt(bench, teacher):
    for seed in range(5):
        source = bench.plant_outliers(teacher, seed, gain=8)
        selective, everything = (
            bench.action_error(source, bench.quantised(source, way, seed, None)[0], seed, 64)
            for way in ("selective", "all layers")
        )
        assert selective < 0.9 * everything, seed


def test_matching_brings_spread_and_energy_back(bench, teacher):
    source = bench.plant_outliers(teacher, 0)
    distance = {}
    for way in ("selective", "QuantVLA"):
        model = bench.quantised(source, way, 0, None)[0]
        wanted, found = (
            collect_attention_stats(m, bench.batches(0), bench.ATTENTION, run=bench.rollout, seed=0).modules.values()
            for m in (source, model)
        )
        pairs = [
            pair
            for w, f in zip(wanted, found, strict=True)
            for pair in zip((*w.std, w.rms), (*f.std, f.rms), strict=True)
        ]
        distance[way] = sum(abs(math.log(b / a)) for a, b in pairs) / len(pairs)
    assert distance["QuantVLA"] < 0.7 * distance["selective"], distance


def test_planting_outliers_keeps_the_function(bench, teacher):
    assert bench.action_error(teacher, bench.plant_outliers(teacher, 0), 0, 16) < 1e-4

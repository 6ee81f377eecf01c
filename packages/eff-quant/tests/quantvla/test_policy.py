"""The trained policy of ``bench/vla``: what the layout and the matching of attention scales do to its actions."""

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "vla"


@pytest.fixture
def ways(monkeypatch):
    """The benchmark's module ``_ways``."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(BENCH))
    import _ways

    return _ways


def test_order_of_action_errors_with_planted_outliers(ways):
    from _policy import load

    teacher, seeds = load(), range(5)
    sources = [ways.plant_outliers(teacher, seed) for seed in seeds]
    mean = {}
    for way in ways.WAYS:
        models = [ways.quantised(s, way, seed, None)[0] for seed, s in zip(seeds, sources, strict=True)]
        errors = [ways.action_error(s, m, seed, 64) for seed, s, m in zip(seeds, sources, models, strict=True)]
        mean[way] = sum(errors) / len(errors)
    assert mean["QuantVLA"] < mean["selective"] < mean["all layers"], mean


def test_planting_outliers_keeps_the_function(ways):
    from _policy import load

    teacher = load()
    assert ways.action_error(teacher, ways.plant_outliers(teacher, 0), 0, 16) < 1e-4

"""Training under FP8 noise recovers attention outputs; the benchmark ``bench/fp8_digits.py`` in small."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("fp8_digits")
    yield module
    for name in ("fp8_digits", "_digits"):
        del sys.modules[name]


def test_projections_learn_to_compensate(bench):
    images, labels = bench.load_digits_images()
    images, labels = images[: bench.HELD_OUT + 400], labels[: bench.HELD_OUT + 400]
    teacher = bench.train_teacher(images[bench.HELD_OUT :], labels[bench.HELD_OUT :], epochs=5)
    runs = {name: bench.run((images, labels), teacher, bench.FORMATS[name], epochs=6) for name in ("none", "e4m3")}
    for r in runs.values():
        assert r["after"] < 0.6 * r["before"]
        assert r["only_listed_changed"]
        assert (r["trained"], r["parameters"]) == (1024, 205_770)
    assert runs["e4m3"]["after"] == pytest.approx(runs["none"]["after"], rel=0.15)
    assert runs["e4m3"]["converted_difference"] < 0.02

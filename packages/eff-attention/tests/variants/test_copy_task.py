"""What mixers can and cannot learn: tokens to copy by position, and values to recall by content."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers")
BENCH = Path(__file__).parents[2] / "bench" / "copy_task.py"


@pytest.mark.slow
@pytest.mark.skipif(not BENCH.exists(), reason="the benchmark with the task is not part of this copy")
def test_what_each_principle_is_needed_for():
    """Limits with room for what three seeds gave. ln 8 = 2.08 is a guess at a value, ln 4 = 1.39 at one of the four."""
    spec = importlib.util.spec_from_file_location("copy_task", BENCH)
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)

    def train(kind, layout, steps=1000):
        return task.train(kind, layout, steps, seed=0, width=48, batch=32)

    standard, no_mixing = train("standard", "uniform"), train("mlp", "uniform", 500)
    by_position, hybrid = train("rnd_emb_qk", "uniform", 800), train("mlp", "even")
    assert no_mixing["copy"] > 2.5
    assert no_mixing["recall"] > 1.9
    assert by_position["copy"] < 0.2  # a map of positions alone can copy
    assert 1.0 < by_position["recall"] < 1.5  # but not compare
    assert standard["copy"] < 0.3
    assert standard["recall"] < by_position["recall"] - 0.2
    assert hybrid["copy"] + hybrid["recall"] < 0.25 * (no_mixing["copy"] + no_mixing["recall"])
    assert hybrid["copy_skipped"] + hybrid["recall_skipped"] > 3 * (hybrid["copy"] + hybrid["recall"])

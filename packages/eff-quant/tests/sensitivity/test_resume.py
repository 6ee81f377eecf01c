import json

import pytest
from eff_quant import sensitivity_sweep

SETTINGS = {"modes": ("component", "block", "grid"), "formats": ("mxfp4",), "grid_top": 3}


@pytest.fixture
def stop_at():
    def make(step, error=KeyboardInterrupt):
        def progress(done, total, text):
            if done == step:
                raise error

        return progress

    return make


def test_a_sweep_that_was_stopped_ends_as_one_that_was_not(trained, windows, tmp_path, stop_at):
    file = tmp_path / "runs" / "sweep.jsonl"
    for step in (0, 2, 9, 26):
        with pytest.raises(KeyboardInterrupt):
            sensitivity_sweep(trained, windows, resume=file, progress=stop_at(step), **SETTINGS)
        lines = file.read_text().splitlines() if file.exists() else []
        assert len(lines) == step
    with file.open("a") as f:
        f.write('{"key": "half a li')
    resumed = sensitivity_sweep(trained, windows, resume=file, **SETTINGS)
    assert resumed == sensitivity_sweep(trained, windows, **SETTINGS)
    assert len({json.loads(line)["key"] for line in file.read_text().splitlines()}) == 1 + 1 + 1 + 22 + 3


def test_what_is_there_is_not_run_again_and_what_differs_is(trained, windows, tmp_path):
    file, runs = tmp_path / "sweep.jsonl", []
    trained.register_forward_hook(lambda *a: runs.append(1))

    def sweep(**changes):
        runs.clear()
        report = sensitivity_sweep(trained, windows, resume=file, modes=("component",), **changes)
        return report, len(runs)

    first, count = sweep()
    assert count > 30
    assert sweep() == (first, 0)
    weights_only, count = sweep(activations=False)
    assert count > 30
    assert weights_only.full("mxfp4") != first.full("mxfp4")
    norm = trained.model.norm.weight.data
    before = norm[3].clone()
    norm[3] += 1.0
    assert sweep()[1] > 30
    norm[3] = before  # taking 1 away again would leave a rounding error behind
    assert sweep() == (first, 0)
    other = sensitivity_sweep(trained, windows[:2], resume=file, modes=("component",))
    assert len(other.counts) < len(first.counts)


def test_a_sweep_that_goes_on_skips_blocks_as_before(trained, windows, tmp_path, stop_at):
    file, runs = tmp_path / "sweep.jsonl", []
    settings = {"formats": ("nvfp4",), "modes": ("block",), "directions": ("restore",), "resume": file}
    with pytest.raises(KeyboardInterrupt):
        sensitivity_sweep(trained, windows, progress=stop_at(3), **settings)
    trained.model.layers[0].mlp.register_forward_hook(lambda *a: runs.append(1))
    sensitivity_sweep(trained, windows, **settings)
    # The base, one look whether blocks may be skipped, and the full run; the others begin behind block 0.
    assert len(runs) == 3 + 1 + 3


def test_layers_of_one_format_are_read_from_a_sweep_of_two(trained, windows, tmp_path):
    both = sensitivity_sweep(trained, windows, modes=(), resume=tmp_path / "sweep.jsonl")
    one = sensitivity_sweep(trained, windows, modes=(), formats=("nvfp4",), resume=tmp_path / "sweep.jsonl")
    assert one == sensitivity_sweep(trained, windows, modes=(), formats=("nvfp4",))
    assert [la.largest for la in both.layers] == [la.largest for la in one.layers]
    kinds = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert sum("layers" in line for line in kinds) == 1


def test_progress_counts_to_the_total(trained, windows):
    seen = []
    sensitivity_sweep(trained, windows, progress=lambda *step: seen.append(step), **SETTINGS)
    done, total, text = zip(*seen, strict=True)
    assert sorted(set(done)) == list(range(1 + 1 + 1 + 22 + 3))
    assert set(total) == {28}
    assert "mxfp4 restore block 2" in [t.strip() for t in text]

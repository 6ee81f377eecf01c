"""Checkpoint folders: whole or not there, checked, pruned."""

import json

import pytest
from eff_train.frame import checkpoint
from eff_train.frame.checkpoint import DamagedCheckpointError


def write(folder):
    (folder / "a.bin").write_bytes(b"weights" * 100)


@pytest.fixture
def three(tmp_path):
    for step, loss in ((10, 0.5), (20, 0.2), (30, 0.4)):
        checkpoint.save(tmp_path, step, write, {"evaluation": {"loss": loss}})
    return tmp_path


def names(root):
    return [p.name for p in sorted(root.iterdir())]


def test_saved_is_found_again(three):
    found = checkpoint.newest(three, pytest.fail)
    assert (found.step, found.record) == (30, {"evaluation": {"loss": 0.4}})
    assert names(three) == ["step-00000010", "step-00000020", "step-00000030"]


DAMAGE = {
    "cut": lambda f: (f / "a.bin").write_bytes(b"weights" * 99),
    "changed": lambda f: (f / "a.bin").write_bytes(b"Weights" + b"weights" * 99),
    "missing": lambda f: (f / "a.bin").unlink(),
    "manifest missing": lambda f: (f / "manifest.json").unlink(),
    "manifest cut": lambda f: (f / "manifest.json").write_text('{"version": 1, "st'),
    "manifest of another kind": lambda f: (f / "manifest.json").write_text("[]"),
    "later format": lambda f: (f / "manifest.json").write_text(
        json.dumps(json.loads((f / "manifest.json").read_text()) | {"version": 2})
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_said_and_the_one_before_is_taken(three, kind):
    DAMAGE[kind](three / "step-00000030")
    said = []
    assert checkpoint.newest(three, said.append).step == 20
    assert said[0].startswith("damaged checkpoint left aside: step-00000030: ")
    assert "going back to step-00000020" in said[-1]
    checkpoint.set_aside(three, 20)
    assert names(three) == ["damaged-step-00000030", "step-00000010", "step-00000020"]


def test_none_whole_is_an_error_and_none_at_all_is_none(three):
    for folder in checkpoint.folders(three):
        DAMAGE["cut"](folder)
    with pytest.raises(DamagedCheckpointError, match="there is no complete checkpoint"):
        checkpoint.newest(three, print)
    assert checkpoint.newest(three / "nothing", pytest.fail) is None


def test_failed_write_leaves_nothing(three):
    def fail(folder):
        write(folder)
        raise OSError(28, "No space left on device")

    for step in (30, 40):
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(three, step, fail, {})
    assert names(three) == ["step-00000010", "step-00000020", "step-00000030"]
    assert checkpoint.newest(three, pytest.fail).step == 30


def test_a_name_appears_when_all_is_written(tmp_path):
    seen = []
    checkpoint.save(tmp_path, 1, lambda f: (write(f), seen.extend(checkpoint.folders(tmp_path))), {})
    assert seen == []


def test_one_of_the_same_step_is_replaced(three):
    checkpoint.save(three, 30, write, {"evaluation": {"loss": 0.1}})
    assert checkpoint.newest(three, pytest.fail).record == {"evaluation": {"loss": 0.1}}
    assert len(names(three)) == 3


def test_best_follows_the_sign(three):
    assert checkpoint.best(three, "-loss", pytest.fail).step == 20
    assert checkpoint.best(three, "+loss", pytest.fail).step == 10
    assert checkpoint.best(three, "", pytest.fail).step == 30
    assert checkpoint.best(three, "+accuracy", pytest.fail).step == 30
    assert checkpoint.best_value(three, "-loss") == -0.2
    assert checkpoint.best_value(three, "-accuracy") is None
    said = []
    DAMAGE["cut"](three / "step-00000020")
    assert checkpoint.best(three, "-loss", said.append).step == 30
    assert len(said) == 1


def test_better():
    assert checkpoint.better({"loss": 1.0}, "-loss", None)
    assert checkpoint.better({"loss": 1.0}, "-loss", -2.0)
    assert not checkpoint.better({"loss": 1.0}, "-loss", -1.0)
    assert not checkpoint.better({"loss": float("nan")}, "-loss", None)
    assert not checkpoint.better({}, "-loss", None)
    assert not checkpoint.better({"loss": 1.0}, "", None)


@pytest.mark.parametrize(
    ("keep", "metric", "left"), [(1, "-loss", [20, 30]), (1, "", [30]), (2, "+loss", [10, 20, 30])]
)
def test_prune(three, keep, metric, left):
    (three / ".unfinished-00000040").mkdir()
    checkpoint.prune(three, keep, metric)
    assert names(three) == [f"step-{s:08d}" for s in left]

"""Two processes under torchrun give what one gives, and go on where one stopped and the other way round."""

import json
from pathlib import Path

import pytest
import torch
from eff_train import registry
from eff_train.cli import main
from eff_train.frame import Training, Workers
from eff_train.frame.checkpoint import newest
from eff_train.frame.metrics import read_metrics
from eff_train.frame.runs import Run, read_checkpoint, write_checkpoint

ALONE = Workers(0, 1, torch.device("cpu"))
SCRIPT = Path(__file__).with_name("two_processes.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
KINDS = ["ddp", "fsdp"]


@pytest.fixture(scope="module")
def module():
    registry.load(str(SCRIPT))
    import sys

    return sys.modules["eff_train_recipe_two_processes"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, module, python):
    """Folder with what one process and two processes did."""
    folder = tmp_path_factory.mktemp("two")
    training = Training(module.Words(module.Config()), ALONE)
    found = module.losses(training, module.BREAK)
    write_checkpoint(Run(folder / "one"), training.state_dict(), {})
    found += module.losses(training, module.UPDATES - module.BREAK)
    with training.judged() as model:
        judged = training.recipe.evaluate(model)
    (folder / "one.json").write_text(json.dumps({"unbroken": found, "judged": judged}))
    done = python(*TORCHRUN, SCRIPT, folder, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def assert_close(found, wanted):
    """Metrics of updates agree within what another order of sums in float32 gives."""
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_one_process(ran, kind):
    one, two = read(ran, "one"), read(ran, kind)
    assert_close(two["unbroken"], one["unbroken"])
    assert two["judged"] == pytest.approx(one["judged"], rel=2e-5)
    assert two["unbroken"][-1]["loss"] < 0.9 * two["unbroken"][0]["loss"]
    assert two["share"] == 1 if kind == "ddp" else 0.4 < two["share"] < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_two_go_on_where_one_stopped(ran, module, kind):
    assert_close(read(ran, kind)["resumed"], read(ran, "one")["unbroken"][module.BREAK :])


@pytest.mark.parametrize("kind", KINDS)
def test_one_goes_on_where_two_stopped(ran, module, kind):
    training = Training(module.Words(module.Config()), ALONE)
    training.load_state_dict(read_checkpoint(newest(Run(ran / kind).checkpoints, pytest.fail)))
    found = module.losses(training, module.UPDATES - module.BREAK)
    assert_close(found, read(ran, "one")["unbroken"][module.BREAK :])


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path, python, capsys):
    """A whole run by two processes: one folder, one log, resumed by one process."""
    options = {"device": "cpu", "steps": 12, "warmup": 2, "dropout": 0, "log-every": 1, "eval-every": 6, "width": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["run", "digits", "--folder", str(tmp_path / "one"), *words]) == 0
    done = python(*TORCHRUN, "-m", "eff_train", "run", "digits", "--folder", "r", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("run folder: r") == 1
    two = read_metrics(tmp_path / "r" / "metrics.jsonl")
    one = read_metrics(tmp_path / "one" / "metrics.jsonl")
    assert [r["event"] for r in two] == [r["event"] for r in one]
    timed = {"samples_per_second", "seconds", "event"}
    assert_close(*([{k: v for k, v in r.items() if k not in timed} for r in log] for log in (two, one)))
    assert json.loads((tmp_path / "r" / "environment.json").read_text())["processes"] == 2
    assert "--nproc-per-node=2" in (tmp_path / "r" / "command.txt").read_text()
    assert main(["resume", str(tmp_path / "r"), "--steps", "14"]) == 0
    assert "going on after update 12" in capsys.readouterr().err


def test_uneven_share_is_one_line(tmp_path, monkeypatch, capsys):
    from eff_train.frame import loop
    from eff_train.recipes.digits import Config, Digits

    with pytest.raises(loop.Refused, match="batch_size=3 cannot be shared evenly by 2 processes"):
        loop.train(Digits(Config(batch_size=3)), Run(tmp_path), Workers(0, 2, torch.device("cpu")))

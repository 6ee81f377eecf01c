"""A broken run goes on as the unbroken one, bit for bit: signals, kills, full disks, damage."""

import os
import resource
import signal

import pytest
from eff_train.cli import main
from eff_train.frame import checkpoint
from eff_train.frame.checkpoint import folders
from eff_train.frame.metrics import read_metrics
from eff_train.frame.runs import Run, locked
from eff_train.recipes.digits import Digits

UPDATE = 23


class Interrupted(Digits):
    """Something happens in update `UPDATE`."""

    def batch(self, samples):
        if samples.start == (UPDATE - 1) * self.config.batch_size:
            self.happens()
        return super().batch(samples)


class Signalled(Interrupted):
    number = signal.SIGTERM

    def happens(self):
        os.kill(os.getpid(), self.number)


class Broken(Interrupted):
    def happens(self):
        raise MemoryError("as if")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, small, train_into):
    run, code = train_into(tmp_path_factory.mktemp("runs") / "unbroken", small())
    assert code == 0
    return run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_run_goes_on(number, tmp_path, small, train_into, unbroken, assert_same_end, capsys):
    recipe = type("Sent", (Signalled,), {"number": number})
    run, code = train_into(tmp_path / "r", small(), recipe)
    assert code == 128 + number
    assert folders(run.checkpoints)[-1].name == f"step-{UPDATE:08d}"
    assert f"saved after update {UPDATE}" in (said := capsys.readouterr().err)
    assert f"eff-train resume {run.folder}" in said
    assert train_into(run.folder, small())[1] == 0
    assert_same_end(run, unbroken)


def test_error_loses_the_updates_since_the_last_checkpoint(tmp_path, small, train_into, unbroken, assert_same_end):
    with pytest.raises(MemoryError):
        train_into(tmp_path / "r", small(), Broken)
    run, code = train_into(tmp_path / "r", small())
    assert code == 0
    resumed = [r for r in read_metrics(run.metrics) if r["event"] == "resume"]
    assert [r["step"] for r in resumed] == [20]
    assert_same_end(run, unbroken)


def test_damaged_checkpoint_costs_one_more(tmp_path, small, train_into, unbroken, assert_same_end, capsys):
    with pytest.raises(MemoryError):
        train_into(tmp_path / "r", small(), Broken)
    with (folders(tmp_path / "r" / "checkpoints")[-1] / "weights.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff\xff")
    run, code = train_into(tmp_path / "r", small())
    assert code == 0
    said = capsys.readouterr().err
    assert "step-00000020: the checksum of weights.safetensors differs" in said
    assert "going back to step-00000010" in said
    assert_same_end(run, unbroken)


def test_max_minutes_ends_with_a_checkpoint(tmp_path, small, train_into, unbroken, assert_same_end):
    run, code = train_into(tmp_path / "r", small(max_minutes=1e-9))
    assert code == 0
    assert [p.name for p in folders(run.checkpoints)] == ["step-00000001"]
    assert read_metrics(run.metrics)[-1] == {"step": 1, "event": "stop", "reason": "max_minutes=1e-09"}
    assert main(["resume", str(run.folder), "--max-minutes", "0"]) == 0
    assert_same_end(run, unbroken)


def limit(size):
    """Let no file of this process grow over ``size`` bytes: writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


class FullDisk(Digits):
    """The disk is full from update 15, until ``room``."""

    room = 25

    def batch(self, samples):
        update = samples.start // self.config.batch_size + 1
        if update in (15, self.room):
            limit(9_000 if update == 15 else resource.RLIM_INFINITY)
        return super().batch(samples)


def test_full_disk_misses_a_checkpoint_and_goes_on(tmp_path, small, train_into, unbroken, assert_same_end, capsys):
    run, code = train_into(tmp_path / "r", small(), FullDisk)
    assert code == 0
    assert "update 20: NO checkpoint written" in capsys.readouterr().err
    assert [r["step"] for r in read_metrics(run.metrics) if r["event"] == "not saved"] == [20]
    assert [p.name for p in folders(run.checkpoints)] == ["step-00000030", "step-00000040"]
    assert_same_end(run, unbroken)


def test_disk_full_to_the_end_keeps_the_last_checkpoint(tmp_path, small, train_into, unbroken, assert_same_end):
    try:
        run, code = train_into(tmp_path / "r", small(), type("Full", (FullDisk,), {"room": 0}))
    finally:
        limit(resource.RLIM_INFINITY)
    assert code == 1
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-00000010"]
    assert train_into(run.folder, small())[1] == 0
    assert_same_end(run, unbroken)


KILLED = '''
"""Digits, and a kill in update 23 or in the middle of the third checkpoint."""
import os, signal
from eff_train.frame import checkpoint
from eff_train.recipes import digits

if os.environ.get("KILL") == "saving":
    sync, seen = checkpoint._sync, []
    def kill(path):
        seen.append(path.name)
        if seen.count("state.pt") == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(path)
    checkpoint._sync = kill

class Killed(digits.Digits):
    def batch(self, samples):
        if samples.start == 22 * self.config.batch_size and os.environ.get("KILL") == "updating":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().batch(samples)

RECIPE = Killed
'''


@pytest.mark.parametrize(("when", "last"), [("updating", 20), ("saving", 20)])
def test_killed_process(when, last, tmp_path, small, unbroken, assert_same_end, python, capsys):
    (tmp_path / "killed.py").write_text(KILLED)
    words = "--steps 40 --batch-size 16 --width 4 --warmup 5 --log-every 4 --eval-every 20 --save-every 10 --ema 0.9"
    command = ["-m", "eff_train", "run", "killed.py", "--folder", "r", "--device", "cpu", *words.split()]
    done = python(*command, cwd=tmp_path, KILL=when)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = Run(tmp_path / "r")
    assert any(p.name.startswith(".unfinished") for p in run.checkpoints.iterdir()) == (when == "saving")
    assert main(["resume", str(run.folder)]) == 0
    assert f"going on after update {last}" in capsys.readouterr().err
    assert not any(p.name.startswith(".unfinished") for p in run.checkpoints.iterdir())
    assert_same_end(run, unbroken)


def test_second_process_in_a_folder_is_refused(unbroken, capsys):
    with locked(unbroken):
        assert main(["resume", str(unbroken.folder)]) == 2
    assert "another process is training" in capsys.readouterr().err


def test_finished_run_has_nothing_to_do(unbroken, capsys):
    before = unbroken.metrics.read_text()
    assert main(["resume", str(unbroken.folder)]) == 0
    assert "nothing to do: 40 updates are done" in capsys.readouterr().err
    assert unbroken.metrics.read_text() == before


def test_no_checkpoint_yet_starts_anew(tmp_path, small, train_into, unbroken, assert_same_end):
    with pytest.raises(MemoryError):
        train_into(tmp_path / "r", small(save_every=0, eval_every=0), Broken)
    assert checkpoint.folders(tmp_path / "r" / "checkpoints") == []
    run, _ = train_into(tmp_path / "r", small())
    assert_same_end(run, unbroken)


def test_better_evaluation_is_saved_at_once(tmp_path, small, train_into):
    run, _ = train_into(tmp_path / "r", small(save_every=0, eval_every=10, keep=1))
    best = checkpoint.best(run.checkpoints, "+accuracy", pytest.fail)
    seen = [r["accuracy"] for r in read_metrics(run.metrics) if r["event"] == "evaluation"]
    assert best.record["evaluation"]["accuracy"] == max(seen)

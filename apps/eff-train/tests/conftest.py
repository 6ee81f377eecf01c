"""Shared by the tests of eff-train: quick runs of the digits recipe, comparing runs, processes of their own."""

import os
import subprocess
import sys

import pytest
import torch
from eff_train.frame import train
from eff_train.frame.metrics import read_metrics
from eff_train.frame.parallel import workers
from eff_train.frame.runs import Run, choose_checkpoint, create, read_checkpoint
from eff_train.recipes.digits import Config, Digits

UNTIMED = {"samples_per_second", "seconds"}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small():
    """Options of a digits run that takes a second, with everything in it that has a state."""

    def options(**changed):
        usual = {"steps": 40, "batch_size": 16, "width": 4, "warmup": 5, "log_every": 4, "eval_every": 20}
        return Config(**{**usual, "save_every": 10, "device": "cpu", "ema": 0.9, **changed})

    return options


@pytest.fixture(scope="session")
def train_into():
    """Train a recipe in this process into a folder, new or to be resumed; returns the run and the exit code."""

    def go(folder, config, recipe=Digits):
        run = Run(folder) if folder.exists() else create(folder, "digits", config, "")
        with workers("cpu", config.parallel) as ranks:
            return run, train(recipe(config), run, ranks)

    return go


def same(a, b) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def assert_same_end():
    """Function that compares the last checkpoint and the metrics of two runs, times aside."""

    def compare(one, other):
        states = [read_checkpoint(choose_checkpoint(r, "last", "", print)) for r in (one, other)]
        assert same(*states)
        logs = [
            [{k: v for k, v in m.items() if k not in UNTIMED} for m in read_metrics(r.metrics)] for r in (one, other)
        ]
        kept = [[m for m in log if m["event"] in ("train", "evaluation")] for log in logs]
        assert kept[0] == kept[1]
        assert kept[0]

    return compare


@pytest.fixture(scope="session")
def python():
    """Run Python with arguments in a process of its own; returns the finished process."""

    def run(*words, cwd, **env):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}
        return subprocess.run(
            [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
        )

    return run
